import { createConnection } from 'node:net'
import { rm } from 'node:fs/promises'
import { once } from 'node:events'
import { CdpError } from '../../core/errors/index.ts'
import type { Qmp } from '../../core/qmp/index.ts'
import { queryBlockState, readExports } from './block-state.ts'
import type { QemuDisk } from './disks.ts'
import { bitmapNumber, isOurs, keyOfName, namesOf } from './names.ts'

export type ReadExportOptions = {
  /** Unix socket on which QEMU shall serve, below 108 bytes. */
  socketPath: string
  /** QEMU serves NBD already (on a migration target): this is its socket; no server is started then. */
  existingServerPath?: string
  /** Offer each disk's disabled bitmap for block status. */
  bitmap?: 'rotated'
  stepDeadlineMs?: number
}

export type ReadExport = {
  key: string
  socketPath: string
  exportName: string
  sizeBytes: number
  /** Name for NBD_OPT_SET_META_CONTEXT, 'qemu:dirty-bitmap:cdp-bitmap-3'; undefined if the disk has no rotated bitmap or none was asked for. */
  bitmapContext: string | undefined
  /** What that bitmap holds; 0 without one. */
  dirtyBytes: number
}

/** NBD's first eight bytes (NBD protocol, "Newstyle negotiation"). */
const nbdMagic = 'NBDMAGIC'

/** True if an NBD server greets on this socket within 1 s. */
export const nbdServerAnswers = async (socketPath: string): Promise<boolean> => {
  const socket = createConnection({ path: socketPath })
  try {
    const [chunk] = (await once(socket, 'data', { signal: AbortSignal.timeout(1000) })) as [Buffer]
    return chunk.subarray(0, nbdMagic.length).toString('latin1') === nbdMagic
  } catch (error) {
    if (Error.isError(error)) return false
    throw error
  } finally {
    socket.destroy()
  }
}

const startServer = async (qmp: Qmp, socketPath: string, deadlineMs: number): Promise<void> => {
  try {
    await qmp.execute('nbd-server-start', { addr: { type: 'unix', data: { path: socketPath } } }, { deadlineMs })
  } catch (error) {
    const isRunning = error instanceof CdpError && error.code === 'QMP_COMMAND' && String(error.context['desc']).includes('already running')
    if (!isRunning) throw error
    if (await nbdServerAnswers(socketPath)) return
    throw new CdpError('CONFLICT', 'This QEMU serves NBD for somebody else already', {
      cause: error, retry: true, hint: 'A migration or a backup may be under way; wait for its end, or say where that server listens.', context: { socketPath } })
  }
}

/**
 * Lets QEMU serve disks read-only over NBD: what the guest has written, below our job, unhindered by it and below the guest's
 * own throttle. All or nothing.
 * @throws CdpError CONFLICT when another NBD server runs in this QEMU or a disk is exported already.
 */
export const openReadExport = async (qmp: Qmp, disks: readonly QemuDisk[], options: ReadExportOptions): Promise<ReadExport[]> => {
  const deadlineMs = options.stepDeadlineMs ?? 5000
  const state = await queryBlockState(qmp)
  const socketPath = options.existingServerPath ?? options.socketPath
  const taken = disks.find((disk) => state.exports.some((entry) => entry.id === namesOf(disk.key).readExport))
  if (taken) throw new CdpError('CONFLICT', `${taken.key} is exported for reading already`, { hint: 'Close that export first.', context: { key: taken.key } })
  if (options.existingServerPath === undefined) await startServer(qmp, socketPath, deadlineMs)
  const opened: ReadExport[] = []
  try {
    for (const disk of disks) {
      const { readExport } = namesOf(disk.key)
      const bitmap = options.bitmap === undefined ? undefined : state.nodes
        .find((node) => node.name === disk.bitmapNode)?.bitmaps.find((candidate) => bitmapNumber(candidate.name) !== undefined && !candidate.recording)
      await qmp.execute('block-export-add', {
        type: 'nbd', id: readExport, 'node-name': disk.readNode, name: readExport, writable: false,
        ...(bitmap ? { bitmaps: [{ node: bitmap.node, name: bitmap.name }] } : {}),
      }, { deadlineMs })
      opened.push({ key: disk.key, socketPath, exportName: readExport, sizeBytes: disk.sizeBytes, bitmapContext: bitmap ? `qemu:dirty-bitmap:${bitmap.name}` : undefined, dirtyBytes: bitmap?.dirtyBytes ?? 0 })
    }
    return opened
  } catch (error) {
    await closeReadExport(qmp, { socketPath: options.socketPath, keys: opened.map(({ key }) => key), stepDeadlineMs: deadlineMs })
    throw error
  }
}

/** Removes our read-only exports (of `keys`, default all) and stops the server if it is ours and serves nothing more. Idempotent. */
export const closeReadExport = async (qmp: Qmp, options: { socketPath: string; keys?: readonly string[]; stepDeadlineMs?: number }): Promise<void> => {
  const deadlineMs = options.stepDeadlineMs ?? 5000
  const ids = readExports(await qmp.execute('query-block-exports')).map((entry) => entry.id)
    .filter((id) => isOurs(id) && keyOfName(id) !== undefined && (options.keys === undefined || options.keys.includes(keyOfName(id) ?? '')))
  await removeExports(qmp, ids, deadlineMs)
  await stopServerIfOurs(qmp, options.socketPath, deadlineMs)
}

/** Ends the exports with their clients' connections and waits until QEMU has let go of them. One that is gone already is no error. */
export const removeExports = async (qmp: Qmp, ids: readonly string[], deadlineMs: number): Promise<void> => {
  for (const id of ids) {
    const sinceMark = qmp.eventMark
    const found = readExports(await qmp.execute('query-block-exports')).find((entry) => entry.id === id)
    if (!found) continue
    if (!found.shuttingDown) await qmp.execute('block-export-del', { id, mode: 'hard' }, { deadlineMs })
    await qmp.waitForEvent((event) => event.event === 'BLOCK_EXPORT_DELETED' && event.data['id'] === id, { deadlineMs, sinceMark })
  }
}

/** Ours is the server that answers on our socket. It is left alone while it exports anything. True if it was stopped. */
export const stopServerIfOurs = async (qmp: Qmp, socketPath: string, deadlineMs: number): Promise<boolean> => {
  const stillExports = readExports(await qmp.execute('query-block-exports')).length > 0
  if (stillExports || !(await nbdServerAnswers(socketPath))) return false
  await qmp.execute('nbd-server-stop', {}, { deadlineMs })
  await rm(socketPath, { force: true })
  return true
}
