import { rm } from 'node:fs/promises'
import { join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import { CdpError } from '../core/errors/index.ts'
import { tool } from '../test/lab/index.ts'
import { figureOf, median, type Bench, type BenchOptions, type Figure } from './figure.ts'
import { AgentSide } from './rig/agent-side.ts'
import { fio } from './rig/fio.ts'
import { PluginSide } from './rig/plugin-side.ts'
import { BASE_EXPORT, DIRTY_EXPORT, SourceDisk } from './rig/source-disk.ts'

const INITIAL = 'sync.initial'
const DELTA = 'sync.delta'
const BITMAP = 'sync.bitmap'
const MIB = 2 ** 20
const BUDGET_BYTES = 64 * MIB
const AGAINST = 'nbdcopy of the same export into null'
/** Written while nothing is captured: so large a share of the disk, in pieces of that size anywhere. */
const DIRTY_SHARE = 0.1
const DIRTY_PIECE_BYTES = 64 * 1024
/** As many reads as a sync has under way. */
const READS_IN_FLIGHT = 8
/** Capture tells its figures once a second. */
const STATS_EVERY_MS = 1100

/** Seconds to MiB/s of the whole disk. */
const rateOf = (sizeBytes: number, startedMs: number): number => sizeBytes / MIB / ((performance.now() - startedMs) / 1000)

type Rig = { source: SourceDisk; agent: AgentSide; plugin: PluginSide; sizeBytes: number }

/** The export read from end to end by somebody who does nothing with it. */
const reference = async ({ source, sizeBytes }: Rig, signal: AbortSignal): Promise<number> => {
  const startedMs = performance.now()
  await tool('nbdcopy', [`nbd+unix:///${BASE_EXPORT}?socket=${source.nbdPath}`, 'null:'], { deadlineMs: 300_000, signal })
  return rateOf(sizeBytes, startedMs)
}

/** The initial sync of a full disk, until its end is durable in the mirror. */
const measureInitial = async (rig: Rig, { quick, say, scratchDirectory, signal }: BenchOptions): Promise<Figure> => {
  const { source, agent, plugin, sizeBytes } = rig
  const rounds: { ours: number; reference: number }[] = []
  for (let round = 0; round < (quick ? 1 : 3); round++) {
    const copied = await reference(rig, signal)
    const vm = String(400 + round)
    await plugin.capture({ vm, targetPath: join(scratchDirectory, `${vm}.sock`), sizeBytes, budgetBytes: BUDGET_BYTES, pairing: agent.pairing }, { copy: true })
    const startedMs = performance.now()
    const { lastSeq } = await plugin.copy(vm, source.nbdPath, sizeBytes)
    await agent.untilDurable(vm, lastSeq)
    const ours = rateOf(sizeBytes, startedMs)
    await plugin.release(vm)
    await agent.untilIdle()
    rounds.push({ ours, reference: copied })
    say(`${INITIAL} round ${round}: ours ${ours.toFixed(0)} MiB/s, nbdcopy ${copied.toFixed(0)}; held at most ${(plugin.news(vm).peakBytes / MIB).toFixed(0)} MiB`)
    await rm(agent.vmDirectory(vm), { recursive: true, force: true })
  }
  return { ...figureOf(INITIAL, 'MiB/s', 'more is better', rounds, AGAINST), note: `${sizeBytes / MIB} MiB of data, durable in the mirror` }
}

/** A delta sync of a disk of which the replica is the same: read, hashed and compared on both sides, and next to nothing sent. */
const measureDelta = async (rig: Rig, { quick, say, scratchDirectory, signal }: BenchOptions): Promise<Figure> => {
  const { source, agent, plugin, sizeBytes } = rig
  const vm = '410'
  await plugin.capture({ vm, targetPath: join(scratchDirectory, `${vm}.sock`), sizeBytes, budgetBytes: BUDGET_BYTES, pairing: agent.pairing }, { copy: true })
  await agent.untilDurable(vm, (await plugin.copy(vm, source.nbdPath, sizeBytes)).lastSeq)
  await agent.untilIdle()
  const rounds: { ours: number; reference: number }[] = []
  for (let round = 0; round < (quick ? 1 : 3); round++) {
    const copied = await reference(rig, signal)
    const startedMs = performance.now()
    const { lastSeq } = await plugin.compare(vm, source.nbdPath, sizeBytes)
    await agent.untilDurable(vm, lastSeq)
    const ours = rateOf(sizeBytes, startedMs)
    rounds.push({ ours, reference: copied })
    say(`${DELTA} round ${round}: ours ${ours.toFixed(0)} MiB/s, nbdcopy ${copied.toFixed(0)}; sent ${plugin.news(vm).sentBytes} bytes`)
  }
  const share = (100 * plugin.news(vm).sentBytes) / sizeBytes
  await plugin.release(vm)
  return { ...figureOf(DELTA, 'MiB/s', 'more is better', rounds, AGAINST), note: `${sizeBytes / MIB} MiB of data, the same on both sides; ${share.toPrecision(2)} % sent` }
}

/** A bitmap sync: only what is dirty is read and sent. Against the same number of pieces, read the same way by somebody who does nothing with them. */
const measureBitmap = async (rig: Rig, { quick, say, scratchDirectory, signal }: BenchOptions): Promise<Figure> => {
  const { source, agent, plugin, sizeBytes } = rig
  const vm = '420'
  await plugin.capture({ vm, targetPath: join(scratchDirectory, `${vm}.sock`), sizeBytes, budgetBytes: BUDGET_BYTES, pairing: agent.pairing }, { copy: true })
  await agent.untilDurable(vm, (await plugin.copy(vm, source.nbdPath, sizeBytes)).lastSeq)
  const pieces = { blockBytes: DIRTY_PIECE_BYTES, depth: READS_IN_FLIGHT, seconds: 120, sizeBytes: Math.floor((sizeBytes * DIRTY_SHARE) / DIRTY_PIECE_BYTES) * DIRTY_PIECE_BYTES }
  /** Bytes of frames that were given to the line so far. */
  const sentBytes = async (): Promise<number> => {
    await delay(STATS_EVERY_MS)
    return plugin.news(vm).stats?.sentBytes ?? 0
  }
  const rounds: { ours: number; reference: number }[] = []
  const shares: number[] = []
  let dirtyMiB = 0
  for (let round = 0; round < (quick ? 1 : 3); round++) {
    await agent.untilIdle()
    const sentBefore = await sentBytes()
    await source.dirtied(() => fio(source.uri, { ...pieces, rw: 'randwrite' }, { signal }), async (dirty) => {
      if (dirty.dirtyBytes === 0) throw new CdpError('INTERNAL', 'what was written is in no bitmap')
      dirtyMiB = dirty.dirtyBytes / MIB
      const { bytesPerSec } = await fio(`nbd+unix:///${DIRTY_EXPORT}?socket=${source.nbdPath}`, { ...pieces, rw: 'randread' }, { signal })
      const startedMs = performance.now()
      const { lastSeq } = await plugin.copyDirty(vm, source.nbdPath, sizeBytes, dirty)
      await agent.untilDurable(vm, lastSeq)
      rounds.push({ ours: rateOf(dirty.dirtyBytes, startedMs), reference: bytesPerSec / MIB })
    })
    shares.push(((await sentBytes()) - sentBefore) / (dirtyMiB * MIB))
    const { ours, reference } = rounds[round]
    say(`${BITMAP} round ${round}: ours ${ours.toFixed(0)} MiB/s, fio ${reference.toFixed(0)}; ${dirtyMiB.toFixed(0)} MiB dirty, sent ${(100 * shares[round]).toFixed(1)} % of it`)
  }
  await plugin.release(vm)
  return {
    ...figureOf(BITMAP, 'MiB/s', 'more is better', rounds, `fio reading as many pieces of ${DIRTY_PIECE_BYTES / 1024} KiB from the same export, ${READS_IN_FLIGHT} under way`),
    note: `${dirtyMiB.toFixed(0)} of ${sizeBytes / MIB} MiB dirty; bytes sent per dirty byte: ${median(shares).toFixed(3)}; durable in the journal`,
  }
}

/** Syncs of a full disk, against nbdcopy of the same export into nothing. */
const run = async (options: BenchOptions): Promise<Figure[]> => {
  const { quick, wants, scratchDirectory: socketDirectory, diskDirectory } = options
  const sizeBytes = (quick ? 512 : 2048) * MIB
  await using stack = new AsyncDisposableStack()
  stack.defer(() => rm(join(diskDirectory, 'sync'), { recursive: true, force: true }))
  const source = stack.use(await SourceDisk.start(socketDirectory, 'sync', sizeBytes, { filled: true }))
  const agent = stack.use(await AgentSide.start({ socketDirectory, diskDirectory: join(diskDirectory, 'sync') }))
  const plugin = stack.use(await PluginSide.start())
  const rig = { source, agent, plugin, sizeBytes }
  const figures: Figure[] = []
  if (wants(INITIAL)) figures.push(await measureInitial(rig, options))
  if (wants(DELTA)) figures.push(await measureDelta(rig, options))
  if (wants(BITMAP)) figures.push(await measureBitmap(rig, options))
  return quick ? figures.map((figure) => ({ ...figure, reduced: true })) : figures
}

export const syncBench: Bench = { names: [INITIAL, DELTA, BITMAP], run }
