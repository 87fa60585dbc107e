// Small durable files: state that must survive a crash whole or not at all. Used by both daemons for intents, definitions and
// markers. Journals and mirrors have their own code, but for `writeAll`, by which everything large is written; secrets are core/pki's.
export { readJsonFile, removeFile, writeFileDurably, writeJsonFile } from './durable-file.ts'
export { readBootId } from './boot-id.ts'
export { writeAll } from './write-all.ts'
