// The local API of a daemon: HTTP over a unix socket, described by TypeBox schemas that server and client share.
//
// A contract (pluginApi, agentApi in schemas/) names method, path, request and answer of every operation. A daemon's main.ts gives
// it handlers with implement() and serves it with createApi; the CLI calls it with ApiClient. Requests are checked at the door:
// unknown fields are refused. Errors are {"error": {code, message, hint, context}}, the same CdpError on both ends.
// GET /v1/events tails the daemon's EventLog as lines of JSON; slow readers are dropped.
//
// This folder never knows what an operation does, never listens on a network, never asks who calls: the socket's mode decides that.
export { ApiClient } from './client.ts'
export type { ApiClientOptions } from './client.ts'
export { implement } from './endpoint.ts'
export type { AnswerOf, Endpoint, Endpoints, Handler, Handlers, RequestOf, Route } from './endpoint.ts'
export { EventLog } from './event-log.ts'
export type { ApiEvent, EventInput } from './event-log.ts'
export { createApi } from './server.ts'
export type { ApiOptions, ApiServer } from './server.ts'
export { httpStatusOf } from './status-codes.ts'
export { agentApi, AgentStatus, AgentVpg, Checkpoint, checkpointSelector, RecoveryPoint, Replica, Retention, Scrub } from './schemas/agent.ts'
export type { CheckpointSelector } from './schemas/agent.ts'
export { Hold, pluginApi, PluginStatus, Suspended, VmStatus, VpgStatus } from './schemas/plugin.ts'
export { eventsEndpoint } from './schemas/events.ts'
export { packageVersion } from './version.ts'
