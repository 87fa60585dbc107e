import { randomBytes } from 'node:crypto'
import { mkdirSync, rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { SegmentSealer } from '../agent/journal/index.ts'
import type { VmStore } from '../agent/journal/index.ts'
import { BUSY_QUEUE_BYTES, Pacer } from '../agent/retention/index.ts'
import { CdpError } from '../core/errors/index.ts'
import { tool } from '../test/lab/index.ts'
import { figureOf, median, type Bench, type BenchOptions, type Figure } from './figure.ts'
import { memoryImagePath } from './rig/disk-directory.ts'
import { buildFrames, feed, openFedStore } from './rig/fed-store.ts'
import { Nbdkit } from './rig/nbdkit.ts'

const RATE = 'promotion.rate'
const INGEST = 'ingest.promoting'
const MIB = 2 ** 20
/** What an agent has by default. */
const PROMOTION_BYTES_PER_SEC = 128 * MIB

/** What retention does to move a base: all that is needed is read, then it is written, then the segments go. */
const promote = async (store: VmStore, signal: AbortSignal): Promise<void> => {
  const seq = store.durableSeq
  await store.base.check(seq, { signal })
  await store.base.promote(seq, { signal })
  await store.base.trim()
}

/** A promotion as an agent paces it, from its first write to the mirror on; reading through the journal comes before it. */
class Promoting implements AsyncDisposable {
  readonly #enough = new AbortController()
  readonly #ended: Promise<void>
  doneBytes = 0
  endedMs = Infinity

  private constructor(store: VmStore, pacer: Pacer, signal: AbortSignal, begun: () => void) {
    const onProgress = ({ doneBytes }: { doneBytes: number }): void => {
      this.doneBytes = doneBytes
      if (doneBytes > 0) begun()
    }
    const promotion = store.base.promote(store.durableSeq, { signal: AbortSignal.any([this.#enough.signal, signal]), pace: (bytes, ending) => pacer.pace(bytes, ending), onProgress })
    this.#ended = promotion.then(
      () => void (this.endedMs = performance.now()),
      (error: unknown) => {
        if (!this.#enough.signal.aborted) throw error
      },
    )
    // Waited for at the end; until then its failure is nobody's.
    this.#ended.catch(() => undefined)
  }

  static async begin(store: VmStore, pacer: Pacer, signal: AbortSignal): Promise<Promoting> {
    const { promise, resolve } = Promise.withResolvers<void>()
    const promoting = new Promoting(store, pacer, signal, resolve)
    await Promise.race([promise, promoting.#ended])
    return promoting
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#enough.abort(new CdpError('ABORTED', 'the round is over'))
    await this.#ended
  }
}

/** As many bytes as `bytes` written in turn to a new file on the same disk, until they are durable: seconds. */
const copySeconds = async (uri: string, path: string, signal: AbortSignal): Promise<number> => {
  const startedMs = performance.now()
  await tool('nbdcopy', ['--flush', uri, path], { deadlineMs: 300_000, signal })
  const seconds = (performance.now() - startedMs) / 1000
  rmSync(path)
  return seconds
}

type Round = { aloneMiBps: number; promotingMiBps: number; promotedBytes: number; beside: number; promotion: { ours: number; reference: number } }

/**
 * One round: a journal is filled with nothing beside it; another one while the first is promoted, as fast as an agent may; then that one is
 * promoted with nothing beside it.
 */
const oneRound = async (directory: string, frames: readonly Buffer[], bytes: number, sourceUri: string, signal: AbortSignal): Promise<Round> => {
  await using sealer = new SegmentSealer()
  await using first = await openFedStore(join(directory, 'first'), sealer)
  const aloneSeconds = await feed(first, frames, signal)
  await first.sealingIdle()
  await using second = await openFedStore(join(directory, 'second'), sealer)
  const pacer = new Pacer({ bytesPerSec: PROMOTION_BYTES_PER_SEC, isBusy: () => second.queuedBytes > BUSY_QUEUE_BYTES })
  let promotedBytes: number
  let promotingSeconds: number
  let beside: number
  {
    await using promoting = await Promoting.begin(first, pacer, signal)
    const beforeBytes = promoting.doneBytes
    const startedMs = performance.now()
    promotingSeconds = await feed(second, frames, signal)
    promotedBytes = promoting.doneBytes - beforeBytes
    beside = Math.min(1, (promoting.endedMs - startedMs) / 1000 / promotingSeconds)
  }
  await second.sealingIdle()
  const reference = bytes / MIB / (await copySeconds(sourceUri, join(directory, 'copy.raw'), signal))
  const promotingAloneMs = performance.now()
  await promote(second, signal)
  const ours = bytes / MIB / ((performance.now() - promotingAloneMs) / 1000)
  return { aloneMiBps: bytes / MIB / aloneSeconds, promotingMiBps: bytes / MIB / promotingSeconds, promotedBytes, beside, promotion: { ours, reference } }
}

/** Promotion against nbdcopy writing as much to the same disk, and what ingest of a VM loses while another one's history is promoted. */
const run = async ({ quick, wants, say, scratchDirectory, diskDirectory, signal }: BenchOptions): Promise<Figure[]> => {
  const totalBytes = (quick ? 64 : 512) * MIB
  const directory = join(diskDirectory, 'promotion')
  const imagePath = memoryImagePath('promotion')
  const frames = buildFrames(totalBytes)
  const bytes = frames.reduce((sum, frame) => sum + frame.length, 0)
  const rounds: Round[] = []
  try {
    writeFileSync(imagePath, randomBytes(totalBytes))
    await using source = await Nbdkit.start(scratchDirectory, '-r', 'file', imagePath)
    for (let round = 0; round < (quick ? 1 : 3); round++) {
      mkdirSync(directory, { recursive: true })
      const one = await oneRound(directory, frames, bytes, `nbd+unix:///?socket=${source.socketPath}`, signal)
      rmSync(directory, { recursive: true })
      rounds.push(one)
      say(
        `${RATE} round ${round}: ours ${one.promotion.ours.toFixed(0)} MiB/s, nbdcopy ${one.promotion.reference.toFixed(0)}; `
        + `${INGEST}: ${one.promotingMiBps.toFixed(0)} MiB/s, ${one.aloneMiBps.toFixed(0)} with nothing beside it`,
      )
    }
  } finally {
    rmSync(imagePath, { force: true })
    rmSync(directory, { recursive: true, force: true })
  }
  const reduced = quick ? { reduced: true } : {}
  const figures: Figure[] = [
    {
      ...figureOf(RATE, 'MiB/s', 'more is better', rounds.map(({ promotion }) => promotion), 'nbdcopy --flush of as many bytes to a new file on the same disk'), ...reduced,
      note: `${totalBytes / MIB} MiB of 4 KiB writes anywhere, journal read twice (checked, then written), without the limit of ${PROMOTION_BYTES_PER_SEC / MIB} MiB/s`,
    },
    {
      ...figureOf(INGEST, 'MiB/s', 'more is better', rounds.map(({ promotingMiBps, aloneMiBps }) => ({ ours: promotingMiBps, reference: aloneMiBps })), 'the same with nothing beside it'), ...reduced,
      note: `a promotion ran beside it for ${(100 * median(rounds.map(({ beside }) => beside))).toFixed(0)} % of the time and took in ${(median(rounds.map(({ promotedBytes }) => promotedBytes)) / MIB).toFixed(0)} MiB of journal`,
    },
  ]
  return figures.filter(({ name }) => wants(name))
}

export const promotionBench: Bench = { names: [RATE, INGEST], run }
