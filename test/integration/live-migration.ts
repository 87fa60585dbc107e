import { setTimeout as pause } from 'node:timers/promises'
import { asList, asObject, stringField } from '../../core/qmp/index.ts'
import { startBareVm } from './bare-vm.ts'
import type { BareVm, BareVmOptions } from './bare-vm.ts'

// A live migration on shared storage as Proxmox runs it (qemu-server 9.2.6: QemuMigrate.pm, QemuMigrate/Helpers.pm): both QEMUs have the same disk files, the
// target waits with -incoming and -S, the state goes over a unix socket. What Proxmox does to configurations is not done here.

export type MigrationOptions = {
  /** Proxmox turns QEMU's dirty-bitmaps capability on where its QEMU supports migrating the bitmaps of its own backups: in all its builds. */
  dirtyBitmaps: boolean
  /** Slow enough to be cancelled. */
  maxBytesPerSec?: number
}

export type Migrated = { status: string; downtimeMs: number; error?: string }

const DEADLINE_MS = 60_000
const POLL_MS = 50

/** Waits until a state of QEMU's own migration is seen. */
const untilStatus = async (vm: BareVm, is: (status: string) => boolean): Promise<Record<string, unknown>> => {
  const endsAtMs = performance.now() + DEADLINE_MS
  for (;;) {
    const found = asObject(await vm.qmp((qmp) => qmp.execute('query-migrate')), 'query-migrate')
    if (is(String(found['status']))) return found
    if (performance.now() > endsAtMs) throw new Error(`the migration does not get there: ${JSON.stringify(found)}`)
    await pause(POLL_MS)
  }
}

/** The target of a migration: the same disks, another process. */
export const startIncoming = (source: BareVm, options: Pick<BareVmOptions, 'format' | 'extraArgs'> = {}): Promise<BareVm & { uri: string }> => {
  const uri = `unix:${source.dir}/migrate-${process.hrtime.bigint().toString(36)}`
  return startBareVm({ ...options, shape: source.shape, disksOf: source, extraArgs: ['-incoming', uri, '-S', ...(options.extraArgs ?? [])] }).then((vm) => Object.assign(vm, { uri }))
}

/** Begins it; QEMU may refuse. */
export const beginMigration = (source: BareVm, uri: string, options: MigrationOptions): Promise<unknown> => source.qmp(async (qmp) => {
  const on = new Set(['auto-converge', 'xbzrle', ...(options.dirtyBitmaps ? ['dirty-bitmaps'] : [])])
  const known = asList(await qmp.execute('query-migrate-capabilities'), 'capabilities').map((one) => stringField(asObject(one, 'a capability'), 'capability'))
  await qmp.execute('migrate-set-capabilities', { capabilities: known.map((capability) => ({ capability, state: on.has(capability) })) })
  await qmp.execute('migrate-set-parameters', { 'max-bandwidth': options.maxBytesPerSec ?? 16 * 2 ** 30, 'downtime-limit': 100, 'xbzrle-cache-size': 4 * 1024 * 1024 })
  return qmp.execute('migrate', { uri })
})

/** Waits for its end, whatever that is. */
export const migrationEnd = async (source: BareVm): Promise<Migrated> => {
  const found = await untilStatus(source, (status) => ['completed', 'failed', 'cancelled'].includes(status))
  const error = found['error-desc']
  return { status: String(found['status']), downtimeMs: Number(found['downtime'] ?? 0), ...(typeof error === 'string' ? { error } : {}) }
}

/** In the middle of it. */
export const cancelMigration = async (source: BareVm): Promise<Migrated> => {
  await untilStatus(source, (status) => status === 'active')
  await source.qmp((qmp) => qmp.execute('migrate_cancel'))
  return migrationEnd(source)
}

export const runState = (vm: BareVm): Promise<string> => vm.qmp(async (qmp) => stringField(asObject(await qmp.execute('query-status'), 'query-status'), 'status'))
