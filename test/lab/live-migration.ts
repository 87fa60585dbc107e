import { setTimeout as delay } from 'node:timers/promises'
import { CdpError } from '../../core/errors/index.ts'
import type { LabVm } from './lab-vm.ts'

const DEADLINE_MS = 60_000
const POLL_MS = 20

/**
 * QEMU's own part of a live migration on shared storage, with what Proxmox asks for (qemu-server 9.2.6); `target` was started with `incoming`. Dirty bitmaps
 * go along, as with Proxmox's builds of QEMU. Resolves when the state is over there; the guest stands still on both sides then.
 * @returns how long the guest has stood still by then, as QEMU says
 */
export const migrateState = async (source: LabVm, incoming: string): Promise<number> => {
  const on = new Set(['auto-converge', 'xbzrle', 'dirty-bitmaps'])
  const known = (await source.monitor.run('query-migrate-capabilities')) as { capability: string }[]
  await source.monitor.run('migrate-set-capabilities', { capabilities: known.map(({ capability }) => ({ capability, state: on.has(capability) })) })
  await source.monitor.run('migrate-set-parameters', { 'max-bandwidth': 16 * 2 ** 30, 'downtime-limit': 100, 'xbzrle-cache-size': 4 * 1024 * 1024 })
  await source.monitor.run('migrate', { uri: incoming })
  const endsAtMs = performance.now() + DEADLINE_MS
  for (;;) {
    const { status, downtime = 0, ...rest } = (await source.monitor.run('query-migrate')) as { status?: string; downtime?: number; 'error-desc'?: string }
    if (status === 'completed') return downtime
    if (status === 'failed' || status === 'cancelled' || performance.now() > endsAtMs) throw new CdpError('IO', `the migration is ${status}: ${rest['error-desc'] ?? ''}`)
    await delay(POLL_MS)
  }
}
