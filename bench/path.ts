import { figureOf, median, type Bench, type BenchOptions, type Direction, type Figure } from './figure.ts'
import { loads } from './capture.ts'
import { cpuFigures, type CpuSample } from './cpu.ts'
import { measureMemory } from './memory.ts'
import { PathRig, type PathRound } from './rig/path-rig.ts'
import { measureRpo } from './rpo.ts'

const SIZE_BYTES = 2 * 1024 ** 3
/** Memory as by default: what the second look runs with. */
export const BUDGET_BYTES = 64 * 1024 * 1024
/** Room for a load that the agent cannot follow: its drain is counted instead. */
const ROOMY_BUDGET_BYTES = 4 * 1024 ** 3
const AGAINST = "QEMU's own mirror over TLS into nbdkit file"
/** Share of the rate found that the second look is run at. */
const LOOK_SHARE = 0.95

type Case = { name: string; load: (typeof loads)[string]; unit: string; direction: Direction; ours: (round: PathRound) => number; reference: (fio: PathRound['fio']) => number; cpu: boolean }

/** Operations a second, the drain counted as time of the load. */
const sustainedIops = ({ fio, drainMs }: PathRound, blockBytes: number): number => fio.totalBytes / blockBytes / (fio.seconds + drainMs / 1000)

const cases: Case[] = [
  { name: 'path.randwrite4k.qd1', load: loads['randwrite4k.qd1'], unit: 'us', direction: 'less is better', ours: ({ fio }) => fio.meanUs, reference: ({ meanUs }) => meanUs, cpu: false },
  { name: 'path.randwrite4k.qd32', load: loads['randwrite4k.qd32'], unit: 'IOPS', direction: 'more is better', ours: (round) => sustainedIops(round, 4096), reference: ({ iops }) => iops, cpu: true },
  {
    name: 'path.seqwrite1m', load: loads.seqwrite1m, unit: 'MiB/s', direction: 'more is better', ours: (round) => sustainedIops(round, 2 ** 20),
    reference: ({ bytesPerSec }) => bytesPerSec / 2 ** 20, cpu: true,
  },
]

const CPU_NAMES = ['cpu.plugin', 'cpu.agent']
const RPO_NAMES = ['rpo.p50', 'rpo.p99', 'lag.p99']
const MEMORY_NAME = 'memory.plugin.peak'

/** One figure of the whole path: rounds of the reference and of ours in turn, then a second look at the rate found, with default memory. */
const measure = async (rig: PathRig, one: Case, vm: string, { quick, say }: BenchOptions): Promise<{ figure: Figure; cpu: CpuSample[]; sustained: number }> => {
  const load = { ...one.load, seconds: quick ? 2 : 5 }
  const rounds: { ours: number; reference: number }[] = []
  const cpu: CpuSample[] = []
  const sustained: number[] = []
  const drains: number[] = []
  let letGo = 0
  await rig.capture(vm, ROOMY_BUDGET_BYTES)
  for (let round = 0; round < (quick ? 1 : 5); round++) {
    const reference = await rig.reference(load)
    const ours = await rig.ours(vm, load)
    if (ours.letGo) {
      letGo++
      say(`${one.name} round ${round}: capture let go, the round does not count: ${rig.plugin.news(vm).letGo.at(-1)}`)
      break
    }
    rounds.push({ ours: one.ours(ours), reference: one.reference(reference.fio) })
    sustained.push(sustainedIops(ours, one.load.blockBytes))
    drains.push(ours.drainMs)
    cpu.push({ load: one.name, capturedBytes: ours.fio.totalBytes, ...ours.cpu, referenceBytes: reference.fio.totalBytes, nbdkitSeconds: reference.nbdkitSeconds })
    say(
      `${one.name} round ${round}: ours ${one.ours(ours).toFixed(1)} ${one.unit}, QEMU over TLS into nbdkit ${one.reference(reference.fio).toFixed(1)}; `
      + `fio ${ours.fio.iops.toFixed(0)} IOPS, drained in ${ours.drainMs.toFixed(0)} ms, settled in ${ours.settleMs.toFixed(0)} ms, held at most ${mib(ours.peakBytes)} MiB`,
    )
  }
  await rig.plugin.release(vm)
  const figure = rounds.length > 0 ? figureOf(one.name, one.unit, one.direction, rounds, AGAINST) : { name: one.name, value: NaN, unit: one.unit, reference: null, ratio: null }
  const rate = sustained.length > 0 ? median(sustained) : 0
  const look = rate === 0 ? 'capture let go' : await secondLook(rig, one, `${vm}9`, rate, quick)
  const drain = drains.length > 0 ? `drain ${median(drains).toFixed(0)} ms of ${load.seconds} s counted; ` : ''
  return { figure: { ...figure, ...(quick ? { reduced: true } : {}), note: `${drain}${look}${letGo > 0 ? '; a round in which capture let go was dropped' : ''}` }, cpu, sustained: rate }
}

/** The rate found, nearly, with the memory that capture has by default: it may neither reach its budget nor let go. */
const secondLook = async (rig: PathRig, one: Case, vm: string, rate: number, quick: boolean): Promise<string> => {
  await rig.capture(vm, BUDGET_BYTES)
  const round = await rig.ours(vm, { ...one.load, seconds: quick ? 1 : 5, rateIops: Math.max(1, rate * LOOK_SHARE) })
  await rig.plugin.release(vm)
  const at = `at ${Math.round(LOOK_SHARE * 100)} % of it with ${mib(BUDGET_BYTES)} MiB`
  return round.letGo ? `NOT sustained ${at}: ${rig.plugin.news(vm).letGo.at(-1)}` : `${at}: at most ${mib(round.peakBytes)} MiB held`
}

export const mib = (bytes: number): string => (bytes / 2 ** 20).toFixed(0)

const run = async (options: BenchOptions): Promise<Figure[]> => {
  const { wants, quick, say, scratchDirectory: socketDirectory, diskDirectory, signal } = options
  const figures: Figure[] = []
  const cpu: CpuSample[] = []
  const wantsCpu = CPU_NAMES.some(wants)
  const wantsRpo = RPO_NAMES.some(wants)
  const rigOptions = { socketDirectory, diskDirectory, sizeBytes: SIZE_BYTES, signal }
  let maxIops = 0
  for (const [index, one] of cases.entries()) {
    const isNeeded = (one.cpu && wantsCpu) || (one.name === 'path.randwrite4k.qd32' && wantsRpo)
    if (!wants(one.name) && !isNeeded) continue
    // A new agent for each: journals only grow here, and are gone with it.
    await using rig = await PathRig.start(rigOptions)
    const measured = await measure(rig, one, String(110 + index), options)
    if (wants(one.name)) figures.push(measured.figure)
    cpu.push(...measured.cpu)
    if (one.name === 'path.randwrite4k.qd32') maxIops = measured.sustained
  }
  if (wantsCpu) figures.push(...cpuFigures(cpu).filter(({ name }) => wants(name)))
  if (wantsRpo || wants(MEMORY_NAME)) {
    await using rig = await PathRig.start(rigOptions)
    if (wantsRpo) figures.push(...(await measureRpo(rig, { quick, say, rateIops: maxIops / 2, signal })).filter(({ name }) => wants(name)))
    if (wants(MEMORY_NAME)) figures.push(await measureMemory(rig, { quick, say }))
  }
  return figures
}

export const pathBench: Bench = { names: [...cases.map(({ name }) => name), ...RPO_NAMES, ...CPU_NAMES, MEMORY_NAME], run }
