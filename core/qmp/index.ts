// QMP, the control protocol of QEMU: JSON lines over a unix socket.
// Who calls it: plugin/qemu (everything that is done to a VM), the lab, benches and tests; qemu-storage-daemon speaks it too.
// `withQmp` is the way in: it waits in line for the socket, runs a few commands and always closes again, because on a Proxmox
// node the socket serves one client at a time and Proxmox itself needs it every ten seconds.
// QmpClient is one connection: commands with deadlines, events buffered (bounded) from the first byte on, so an event that
// arrives between two commands is not lost. QmpParser is the protocol without I/O.
// The shape functions check what QEMU sent before it is believed: a wrong shape is QMP_PROTOCOL, never an undefined later on.
// It never reconnects behind the caller's back, never repeats a command, never logs.
export { QmpParser } from './qmp-parser.ts'
export type { QmpMessage, QmpEvent, QmpGreeting, QmpVersion } from './qmp-parser.ts'
export { QmpClient } from './qmp-client.ts'
export type { QmpConnectOptions, QmpExecuteOptions, QmpWaitOptions, Qmp } from './qmp-client.ts'
export { withQmp } from './with-qmp.ts'
export { asList, asObject, booleanField, countField, listField, objectField, optionalField, stringField } from './shape.ts'
export type { JsonObject } from './shape.ts'
