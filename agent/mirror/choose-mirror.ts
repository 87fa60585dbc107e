import { basename, dirname, join } from 'node:path'
import type { DiskEntry } from '../../core/record/index.ts'
import type { MirrorSpec } from './mirror-record.ts'

/** For every disk that has no choice of its own. */
export type MirrorDefault = { kind: 'file' } | { kind: 'qcow2'; directory?: string }
/** `mirrors` of agent.json. VMs are named by their id, or by site id/id; disks by their key. */
export type MirrorChoices = { default: MirrorDefault; vms: Record<string, { default?: MirrorDefault; disks?: Record<string, MirrorSpec | MirrorDefault> }> }

/** What the operator chose for a disk of the VM that has `vmDirectory` (<site id>/<vm>). */
export const chooseMirror = (choices: MirrorChoices, vmDirectory: string, { disk, key }: Pick<DiskEntry, 'disk' | 'key'>): MirrorSpec => {
  const vm = basename(vmDirectory)
  const siteId = basename(dirname(vmDirectory))
  const own = choices.vms[`${siteId}/${vm}`] ?? choices.vms[vm]
  const chosen = own?.disks?.[key] ?? own?.default ?? choices.default
  if (chosen.kind === 'file' || 'path' in chosen) return chosen
  const directory = 'directory' in chosen ? chosen.directory : undefined
  return { kind: 'qcow2', path: directory === undefined ? join(vmDirectory, 'mirror', `${disk}.qcow2`) : join(directory, `${siteId}.${vm}.${disk}.qcow2`) }
}
