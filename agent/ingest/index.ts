// Ingest: streams of protected VMs in, acknowledgements out. core/link hands over verified connections; frames go to the VM's store
// (agent/journal), marks to the catalogue (agent/checkpoint); nothing is acknowledged that is not durable.
// It never changes a frame and never decides which frames make sense: the store does.
export { Ingest } from './ingest.ts'
export { GroupGenerations } from './group-generations.ts'
export type { GroupGeneration } from './group-generations.ts'
export { VmRegistry } from './vm-registry.ts'
export type { RegisteredVm } from './vm-registry.ts'
