// What an operator can ask of the agent: implements the agent's contract (core/api) on catalogue, stores and recovery points. main.ts serves
// it on a unix socket.
export { agentRoutes } from './agent-routes.ts'
export type { AgentParts } from './agent-routes.ts'
export { deleteReplica, listReplicas } from './replica-desk.ts'
export type { ReplicaParts } from './replica-desk.ts'
export { PointDesk } from './point-desk.ts'
