// What an operator can ask of the plugin: implements the plugin's contract (core/api) on VPGs and pairing. main.ts serves it on a unix
// socket. It never talks to QEMU or to an agent itself.
export { pluginRoutes } from './plugin-routes.ts'
export { PluginService } from './plugin-service.ts'
export type { PluginServiceOptions } from './plugin-service.ts'
