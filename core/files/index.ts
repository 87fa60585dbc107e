// Small durable files: state that must survive a crash whole or not at all. Used by both daemons for intents, definitions and
// markers. Journals and mirrors have their own code; secrets are core/pki's.
export { readJsonFile, removeFile, writeFileDurably, writeJsonFile } from './durable-file.ts'
