import { setTimeout as sleep } from 'node:timers/promises'
import { CdpError, errorMessage } from '../../core/errors/index.ts'
import type { Logger } from '../../core/log/index.ts'
import { checkHandshake } from '../../core/nbd/index.ts'
import { withQmp } from '../../core/qmp/index.ts'
import type { Qmp } from '../../core/qmp/index.ts'
import type { CheckpointMark } from '../../core/record/index.ts'
import type { CaptureWorker } from '../capture/index.ts'
import { beginRound, discoverDisks, dropCovered, endRound, holdRound, jobInTheWay, lookAtRound, ownMirrors, recordingKeys } from '../qemu/index.ts'
import type { QemuDisk } from '../qemu/index.ts'
import type { RunningVm } from './vm-files.ts'
import type { VmMemory, VmMemoryFile } from './vm-memory.ts'

export type RoundsOptions = {
  qmpPath: string
  targetPath: string
  disks: readonly QemuDisk[]
  /** A new stream to the agent. @throws if there is none, or if what the bitmaps say is not enough for that agent */
  open: () => Promise<Pick<CaptureWorker, 'ask'>>
  /** QEMU is connected for that disk. */
  isOpen: (key: string) => boolean
  /** Ends QEMU's connections. */
  letGo: (why: string) => Promise<void>
  /** What waits for the link. */
  waitingBytes: () => number
  /** The checkpoint that a round is, made at its instant. */
  mark: () => CheckpointMark
  /** The agent holds everything up to that sequence; kept before bitmaps go. */
  noteDurable: (seq: number) => Promise<void>
  /** A round is durable at the agent. */
  onRound: (mark: CheckpointMark) => void
  /** From the beginning of one round to that of the next, if it is over by then. */
  everyMs: number
  /** Of each disk's job. */
  bytesPerSec: number
  /** Above, the jobs are held. */
  holdAboveBytes: number
  log: Logger
  /** Ends the rounds, with a round that is under way. */
  signal: AbortSignal
}

const QMP_DEADLINE_MS = 10_000
const HANDSHAKE_DEADLINE_MS = 2_000
const LOOK_FIRST_MS = 50
const LOOK_MAX_MS = 1_000
/** How soon the end of the backup is noticed. */
const BACKUP_LOOK_MS = 2_000
const PAUSE_AFTER_FAILURE_MAX_MS = 60_000

/**
 * Why rounds could not bring a VM in step (docs/decisions/incremental-rounds.md); undefined: they can. Pure.
 * @param recording the disks on which a bitmap of ours records
 */
export const whyNoRounds = (memory: VmMemory | undefined, disks: readonly Pick<QemuDisk, 'key' | 'sizeBytes'>[], recording: ReadonlySet<string>): string | undefined => {
  if (memory?.bitmaps !== 'covered') return 'no bitmap says what is missing at the recovery site'
  const unsure = disks.find(({ key, sizeBytes }) => !recording.has(key) || (memory.disks !== undefined && memory.disks[key] !== sizeBytes))
  if (unsure !== undefined) return `no bitmap says all of ${unsure.key}`
  // A disk that is gone would stay in the stream's list without ever being copied; the attach that follows sorts that out.
  const gone = Object.keys(memory.disks ?? {}).find((key) => !disks.some((disk) => disk.key === key))
  return gone === undefined ? undefined : `${gone} is gone`
}

/**
 * The disks of a VM that rounds can bring in step.
 * @throws CdpError CONFLICT: why they cannot; QMP_*
 */
export const roundableDisks = async (vm: RunningVm, file: Pick<VmMemoryFile, 'read'>): Promise<QemuDisk[]> => {
  const memory = await file.read(vm.instance)
  return withQmp(vm.qmpPath, { deadlineMs: QMP_DEADLINE_MS }, async (qmp) => {
    const disks = await discoverDisks(qmp)
    const left = await ownMirrors(qmp)
    if (left.length > 0) throw new CdpError('CONFLICT', `${left[0]} of an earlier attach is in QEMU until the backup ends`, { retry: true })
    const job = await jobInTheWay(qmp, disks.map(({ key }) => key))
    const why = job?.type === 'backup' ? whyNoRounds(memory, disks, await recordingKeys(qmp, disks)) : 'no backup is in the way'
    if (why !== undefined) throw new CdpError('CONFLICT', why, { retry: true })
    return disks
  })
}

/** Incremental rounds of one VM, one after the other, for as long as a backup is in the way of capture. */
export class BackupRounds {
  readonly #options: RoundsOptions
  readonly #keys: readonly string[]
  #worker: Pick<CaptureWorker, 'ask'> | undefined
  #pauseMs: number

  constructor(options: RoundsOptions) {
    this.#options = options
    this.#keys = options.disks.map(({ key }) => key)
    this.#pauseMs = options.everyMs
  }

  /** Resolves when capture can be attached again, with the reason. @throws the signal's reason; what QEMU's connection throws, for a VM that is gone */
  async run(): Promise<void> {
    const { everyMs, log, signal } = this.#options
    try {
      for (;;) {
        const startMs = performance.now()
        if ((await this.#inTheWay()) === undefined) return
        try {
          await this.#round()
          this.#pauseMs = everyMs
        } catch (error) {
          signal.throwIfAborted()
          log.warn('an incremental round did not come to its end; the next one covers it', { error: errorMessage(error) })
          await this.#abandon(errorMessage(error))
          this.#pauseMs = Math.min(PAUSE_AFTER_FAILURE_MAX_MS, this.#pauseMs * 2)
        }
        const nextMs = startMs + this.#pauseMs
        for (let leftMs = nextMs - performance.now(); leftMs > 0; leftMs = nextMs - performance.now()) {
          await sleep(Math.min(leftMs, BACKUP_LOOK_MS), undefined, { signal })
          if ((await this.#inTheWay()) === undefined) return
        }
      }
    } catch (error) {
      await this.#abandon(errorMessage(error))
      throw error
    }
  }

  /** @throws CdpError CONFLICT: something else than a backup is in the way now */
  async #inTheWay(): Promise<string | undefined> {
    this.#options.signal.throwIfAborted()
    const job = await this.#qmp((qmp) => jobInTheWay(qmp, this.#keys))
    if (job !== undefined && job.type !== 'backup') throw new CdpError('CONFLICT', `${job.id} (${job.type}) is in the way of capture`, { retry: true })
    return job?.id
  }

  async #round(): Promise<void> {
    const { open, targetPath, bytesPerSec, disks, mark, onRound } = this.#options
    const worker = (this.#worker ??= await open())
    await Promise.all(this.#keys.map((key) => checkHandshake({ path: targetPath }, key, HANDSHAKE_DEADLINE_MS)))
    await worker.ask('beginRound', { reason: 'incremental round under a backup' })
    const { covered } = await this.#qmp((qmp) => beginRound(qmp, disks, { nbdSocketPath: targetPath, exportNameOf: (key) => key, bytesPerSec }))
    const checkpoint = mark()
    await this.#untilCopied()
    // The nodes go, and with them the connections: cleanly, if everything has arrived.
    await this.#qmp(endRound)
    await this.#untilClosed()
    const { lastSeq } = await worker.ask('endRound', { mark: checkpoint })
    await worker.ask('durable', { seq: lastSeq })
    await this.#options.noteDurable(lastSeq)
    await this.#qmp((qmp) => dropCovered(qmp, covered))
    onRound(checkpoint)
  }

  async #untilCopied(): Promise<void> {
    const { isOpen, waitingBytes, holdAboveBytes, signal } = this.#options
    const seen = new Set<string>()
    let held = false
    for (let lookMs = LOOK_FIRST_MS; ; lookMs = Math.min(LOOK_MAX_MS, lookMs * 2)) {
      await sleep(lookMs, undefined, { signal })
      const lost = this.#keys.find((key) => !isOpen(key) && seen.has(key))
      for (const key of this.#keys) if (isOpen(key)) seen.add(key)
      if (lost !== undefined) throw new CdpError('ABORTED', `QEMU's connection of ${lost} is gone`, { retry: true })
      const hold = waitingBytes() > holdAboveBytes
      const { ended, failed } = await this.#qmp(async (qmp) => {
        const look = await lookAtRound(qmp, this.#keys)
        if (hold !== held) await holdRound(qmp, this.#keys, hold)
        return look
      })
      held = hold
      if (failed !== undefined) throw new CdpError('ABORTED', `a job of the round failed: ${failed}`, { retry: true })
      if (ended) return
    }
  }

  /** The worker hears of the end of its connections a moment after QEMU has closed them. */
  async #untilClosed(): Promise<void> {
    const endMs = performance.now() + HANDSHAKE_DEADLINE_MS
    while (this.#keys.some((key) => this.#options.isOpen(key)) && performance.now() < endMs) await sleep(5, undefined, { signal: this.#options.signal })
  }

  /** Connections first: a command to QEMU waits for a target that is silent. */
  async #abandon(why: string): Promise<void> {
    const { letGo, log } = this.#options
    this.#worker = undefined
    await letGo(why)
    await this.#qmp(endRound).catch((error: unknown) => log.warn('a round could not be taken out of QEMU; it is taken away with the next attach', { error: errorMessage(error) }))
  }

  #qmp<T>(work: (qmp: Qmp) => Promise<T>): Promise<T> {
    return withQmp(this.#options.qmpPath, { deadlineMs: QMP_DEADLINE_MS }, work)
  }
}
