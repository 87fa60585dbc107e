import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdtemp, rm } from 'node:fs/promises'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { CdpError, errorMessage } from '../../core/errors/index.ts'
import { NbdClient, NbdServer } from '../../core/nbd/index.ts'
import type { NbdExport } from '../../core/nbd/index.ts'
import { withQmp } from '../../core/qmp/index.ts'
import type { Qmp } from '../../core/qmp/index.ts'

export type DiscardProbeOptions = {
  /** Of the QEMU that the VMs run. */
  program?: string
  /** Where a directory for some sockets is made; its name short, see sun_path. */
  directory: string
  /** For all of it. Default 15 s. */
  deadlineMs?: number
}

/** What became of a discard of the guest under a mirror job. `copied`: as what it reached the job's target, if it did. */
export type DiscardFate = { reachesStorage: boolean; copied: 'discard' | 'zeroes' | 'not'; version: string }

const SIZE_BYTES = 4 * 1024 * 1024
const DEADLINE_MS = 15_000

/** A disk of nothing that notes what is done to it. */
class NotingExport implements NbdExport {
  readonly sizeBytes = SIZE_BYTES
  readonly readOnly = false
  readonly blockSize = { minBytes: 512, preferredBytes: 4096, maxBytes: 1024 * 1024 }
  readonly canMultiConn = false
  readonly metaContexts = []
  readonly name: string
  discards = 0
  zeroes = 0
  writes = 0

  constructor(name: string) {
    this.name = name
  }

  async read(_offsetBytes: number, lengthBytes: number): Promise<readonly Uint8Array[]> {
    return [Buffer.alloc(lengthBytes)]
  }

  async write(): Promise<void> {
    this.writes++
  }

  async writeZeroes(): Promise<void> {
    this.zeroes++
  }

  async trim(): Promise<void> {
    this.discards++
  }

  async flush(): Promise<void> {}
}

/**
 * Finds out what this QEMU does with a guest's discards while a mirror job as ours runs: with a scratch job in a qemu-storage-daemon, whose disk and target
 * are NBD exports of ours. No VM is touched, and nothing is left.
 * @throws CdpError NOT_FOUND: there is no such program; TIMEOUT, QMP_*, IO: it could not be found out
 */
export const probeDiscards = async ({ program = 'qemu-storage-daemon', directory, deadlineMs = DEADLINE_MS }: DiscardProbeOptions): Promise<DiscardFate> => {
  await using stack = new AsyncDisposableStack()
  const dir = await mkdtemp(join(directory, 'probe-'))
  stack.defer(() => rm(dir, { recursive: true, force: true }))
  const [source, target] = [new NotingExport('source'), new NotingExport('target')]
  const ours = join(dir, 'o')
  stack.use(await NbdServer.listen({ address: { path: ours }, findExport: (name) => [source, target].find((one) => one.name === name), listExports: () => [source, target] }))
  const node = (name: string): string[] => ['--blockdev', JSON.stringify({ driver: 'nbd', 'node-name': name, server: { type: 'unix', path: ours }, export: name, discard: 'unmap' })]
  const door = join(dir, 'd')
  const qmpPath = join(dir, 'q')
  const child = spawn(program, [
    ...node('source'), ...node('target'), '--nbd-server', `addr.type=unix,addr.path=${door}`, '--export', 'nbd,id=door,node-name=source,name=door,writable=on',
    '--chardev', `socket,id=qmp,path=${qmpPath},server=on,wait=off`, '--monitor', 'chardev=qmp',
  ], { stdio: ['ignore', 'ignore', 'pipe'] })
  let said = ''
  child.stderr.setEncoding('utf8').on('data', (text: string) => (said = (said + text).slice(-1000)))
  const gone = new AbortController()
  const ended = once(child, 'close').then(() => gone.abort(new CdpError('IO', `${program} has ended: ${said.trim()}`)), (error: unknown) => gone.abort(new CdpError('NOT_FOUND', `${program} cannot be run: ${errorMessage(error)}`)))
  stack.defer(async () => {
    child.kill('SIGKILL')
    await ended
  })
  const signal = AbortSignal.any([gone.signal, AbortSignal.timeout(deadlineMs)])
  await answering(qmpPath, signal)
  const client = stack.use(await NbdClient.connect({ path: door }, { exportName: 'door', signal }))
  await client.trim(0, SIZE_BYTES / 2, { signal })
  if (source.discards === 0) throw new CdpError('INTERNAL', 'the scratch disk gets no discards even without a job')
  const version = await withQmp(qmpPath, { deadlineMs }, (qmp) => startMirror(qmp, deadlineMs))
  // What the job does by itself is no discard of the guest.
  const before = { discards: source.discards, writes: target.writes, zeroes: target.zeroes }
  await client.trim(0, SIZE_BYTES / 2, { signal })
  // A write behind it shows that the job copies at all, and that what was copied of the discard has arrived.
  await client.write(SIZE_BYTES / 2, Buffer.alloc(4096, 1), { signal })
  await client.flush(signal)
  if (target.writes === before.writes) throw new CdpError('INTERNAL', 'the scratch job copies nothing')
  return { reachesStorage: source.discards > before.discards, copied: target.discards > 0 ? 'discard' : target.zeroes > before.zeroes ? 'zeroes' : 'not', version }
}

const answering = async (qmpPath: string, signal: AbortSignal): Promise<void> => {
  for (;;) {
    signal.throwIfAborted()
    try {
      return await withQmp(qmpPath, { deadlineMs: 1000 }, async () => undefined)
    } catch {
      // Not yet; how it ends is the signal's to say.
      await sleep(20)
    }
  }
}

const startMirror = async (qmp: Qmp, deadlineMs: number): Promise<string> => {
  await qmp.execute('blockdev-mirror', { 'job-id': 'probe', device: 'source', target: 'target', sync: 'none', 'copy-mode': 'write-blocking' })
  await qmp.waitForEvent(({ event }) => event === 'BLOCK_JOB_READY' || event === 'BLOCK_JOB_COMPLETED', { deadlineMs, sinceMark: 0 })
  const { major, minor, micro } = qmp.version
  return `${major}.${minor}.${micro}`
}
