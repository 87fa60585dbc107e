import { join } from 'node:path'

/** A daemon's configuration: what differs from the product's defaults. */
export type SiteConfig = Record<string, unknown>

/** The agent of a lab below one root directory, on loopback. */
export const agentConfig = (rootDir: string): SiteConfig => ({
  stateDirectory: join(rootDir, 'agent'),
  runDirectory: join(rootDir, 'run'),
  apiSocket: join(rootDir, 'run/agent.sock'),
  pointSocket: join(rootDir, 'run/points.sock'),
  listen: { host: '127.0.0.1', port: 0 },
  // How full the machine's disk is must not shorten a history here.
  retention: { reserveBytes: 0 },
})

/** The plugin of a lab node whose files lie below the root directory as on a Proxmox node. */
export const pluginConfig = (rootDir: string): SiteConfig => ({
  qemuServerDirectory: join(rootDir, 'var/run/qemu-server'),
  pveDirectory: join(rootDir, 'etc/pve'),
  vpgFile: join(rootDir, 'etc/pve/cdp-vpgs.json'),
  stateDirectory: join(rootDir, 'plugin'),
  runDirectory: join(rootDir, 'run'),
  apiSocket: join(rootDir, 'run/plugin.sock'),
  spill: { directory: join(rootDir, 'spill'), reserveBytes: 0 },
  proofEveryMs: 2000,
})
