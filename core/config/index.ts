// Configuration files of the daemons: JSON, checked against a schema with defaults, refused with the name of the field that is wrong.
// Called by main.ts of each daemon, once. Secrets are not kept in configuration files.
export { loadConfig } from './load-config.ts'
