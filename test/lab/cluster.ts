import { existsSync, lstatSync, mkdirSync, readFileSync, renameSync, symlinkSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { pluginApi } from '../../core/api/index.ts'
import { makeNode, placeVm } from './node-files.ts'
import { pluginConfig, type SiteConfig } from './site-config.ts'
import { LabDaemon } from './sites.ts'

/** The directory that stands for the cluster file system, below the root directory of the first node. */
export const clusterDirOf = (rootDir: string): string => join(rootDir, 'cluster')

/**
 * Lays a root directory out as a node of a cluster: etc/pve shows what all nodes share (nodes, priv, .vmlist), and its own `local` and
 * `qemu-server`. Before anything else is put there.
 */
export const makeClusterNode = (rootDir: string, clusterDir: string, nodeName: string): void => {
  for (const dir of ['nodes', 'priv/lock']) mkdirSync(join(clusterDir, dir), { recursive: true, mode: 0o700 })
  const pve = join(rootDir, 'etc/pve')
  mkdirSync(pve, { recursive: true })
  for (const name of ['nodes', 'priv', '.vmlist']) if (!lstatSync(join(pve, name), { throwIfNoEntry: false })) symlinkSync(join(clusterDir, name), join(pve, name))
  makeNode(rootDir, nodeName)
}

/** The plugin of such a node: shared files at their own place (a symlink would not survive being replaced), links on loopback. */
export const clusterPluginConfig = (rootDir: string, clusterDir: string): SiteConfig => ({
  ...pluginConfig(rootDir),
  vpgFile: join(clusterDir, 'cdp-vpgs.json'),
  siteDirectory: join(clusterDir, 'priv/cdp'),
  nodeLink: { host: '127.0.0.1', port: 0 },
})

/** The plugin of a further node, not started yet. */
export const clusterPlugin = (rootDir: string, clusterDir: string, config: SiteConfig = {}): LabDaemon =>
  new LabDaemon('plugin', rootDir, { ...clusterPluginConfig(rootDir, clusterDir), ...config })

/** What a migration does to the cluster's files: the configuration moves to the other node's directory, and the list says so. */
export const moveVm = (fromRootDir: string, toRootDir: string, vmId: number, toNode: string): void => {
  const [from, to] = [fromRootDir, toRootDir].map((root) => join(root, `etc/pve/qemu-server/${vmId}.conf`))
  if (existsSync(from)) renameSync(from, to)
  placeVm(toRootDir, vmId, toNode)
}

/** Proxmox's lock on a VM that is being migrated, in its configuration; or none. */
export const lockForMigration = (rootDir: string, vmId: number, locked: boolean): void => {
  const path = join(rootDir, `etc/pve/qemu-server/${vmId}.conf`)
  const rest = readFileSync(path, 'utf8').replace(/^lock: .*\n/m, '')
  writeFileSync(`${path}.tmp`, locked ? `lock: migrate\n${rest}` : rest)
  renameSync(`${path}.tmp`, path)
}

/** Has a node cut a tagged checkpoint. */
export const tagAt = (plugin: LabDaemon, vpg: string, tag: string) => plugin.api.call(pluginApi.tagCheckpoint, { params: { name: vpg }, body: { tag } })
