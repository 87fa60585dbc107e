// The catalogue of checkpoints: which there are, which are valid, proved or suspect, and where in each journal they cut. Derived from
// marks in the journals and made again from them when it is lost. agent/ingest notes marks, recovery points and the API ask,
// agent/retention has those forgotten that are no longer recoverable or were thinned out.
// It never decides about history and never reads a journal itself.
export { Catalogue } from './catalogue.ts'
export type { CatalogueEntry, CheckpointState, VpgEntry } from './catalogue.ts'
