import { rmSync } from 'node:fs'
import { join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import { CdpError } from '../core/errors/index.ts'
import { createOverlay, startVm } from '../test/lab/index.ts'
import { figureOf, median, type Bench, type BenchOptions, type Figure } from './figure.ts'
import { benchJournal, JOURNAL_VM, type BenchJournal } from './rig/journals.ts'
import { PointSide } from './rig/point-side.ts'

const GIB = 1024 ** 3
const FIRST_READ_DEADLINE_MS = 30_000
const VM_ID = 901

type Case = { name: string; records: number; diskBytes: number; targetMs: number }

const cases: Case[] = [
  { name: 'boot.disk1g', records: 10_000, diskBytes: GIB, targetMs: 2000 },
  { name: 'boot.disk1t', records: 10_000, diskBytes: 1024 * GIB, targetMs: 2000 },
  { name: 'boot.records1e4', records: 10_000, diskBytes: 100 * GIB, targetMs: 2000 },
  { name: 'boot.records1e6', records: 1_000_000, diskBytes: 100 * GIB, targetMs: 2000 },
  { name: 'boot.records1e8', records: 100_000_000, diskBytes: 100 * GIB, targetMs: 5000 },
]
const QUICK_RECORDS = 1_000_000

type PowerOn = { runningMs: number; firstReadMs: number }

/** Makes an overlay, starts a VM of it, and sees it run and read its first sector; all times from `startedMs`. */
const powerOn = async (rootDir: string, backing: string, sizeBytes: number, startedMs: number): Promise<PowerOn> => {
  const overlay = join(rootDir, 'overlay.qcow2')
  await createOverlay(overlay, backing, sizeBytes)
  await using vm = await startVm({ rootDir, vmId: VM_ID, shape: '9.x', disks: [{ key: 'scsi0', path: overlay, format: 'qcow2', sizeBytes }], memoryMiB: 64 })
  const { running } = (await vm.monitor.run('query-status')) as { running: boolean }
  if (!running) throw new CdpError('INTERNAL', 'the VM was started and does not run')
  const runningMs = performance.now() - startedMs
  while (performance.now() - startedMs < FIRST_READ_DEADLINE_MS) {
    const stats = (await vm.monitor.run('query-blockstats')) as { stats: { rd_operations: number } }[]
    if (stats.some(({ stats: { rd_operations } }) => rd_operations > 0)) return { runningMs, firstReadMs: performance.now() - startedMs }
    await delay(5)
  }
  throw new CdpError('TIMEOUT', 'the firmware read nothing of its disk')
}

const measure = async ({ name, records, diskBytes, targetMs }: Case, journal: BenchJournal, { quick, say, scratchDirectory }: BenchOptions): Promise<Figure> => {
  const rounds: { ours: number; reference: number }[] = []
  const firstReads: number[] = []
  const opens: number[] = []
  let residentBytes = 0
  for (let round = 0; round < (quick ? 1 : 5); round++) {
    const reference = await powerOn(scratchDirectory, join(journal.directory, 'mirror/0.raw'), diskBytes, performance.now())
    // A process without anything in its caches, as after the agent's start.
    await using points = await PointSide.start(join(scratchDirectory, 'points.sock'))
    const startedMs = performance.now()
    const opened = await points.ask({ do: 'open', pointId: `boot${round}`, vm: JOURNAL_VM, vmDirectory: journal.directory, seq: journal.lastSeq })
    const ours = await powerOn(scratchDirectory, opened.uri, diskBytes, startedMs)
    residentBytes = Math.max(residentBytes, opened.residentBytes)
    rounds.push({ ours: ours.runningMs, reference: reference.runningMs })
    firstReads.push(ours.firstReadMs)
    opens.push(opened.tookMs)
    say(`${name} round ${round}: point open ${opened.tookMs.toFixed(0)} ms, runs ${ours.runningMs.toFixed(0)}, first read ${ours.firstReadMs.toFixed(0)}; from a plain file ${reference.runningMs.toFixed(0)}`)
  }
  const isReduced = journal.records < records
  return {
    ...figureOf(name, 'ms', 'less is better', rounds, 'an overlay on the mirror file'), ...(quick || isReduced ? { reduced: true } : {}),
    note: `target below ${targetMs} ms; point open after ${median(opens).toFixed(0)} ms, first sector read after ${median(firstReads).toFixed(0)} ms${isReduced ? `, ${journal.records} records only` : ''}; `
      + `${(residentBytes / 2 ** 20).toFixed(0)} MiB resident`,
  }
}

/** From "open this checkpoint" to a VM that runs, by size of disk and length of history. */
const run = async (options: BenchOptions): Promise<Figure[]> => {
  const { quick, wants, say, diskDirectory, signal } = options
  const figures: Figure[] = []
  let journal: BenchJournal | undefined
  try {
    for (const one of cases.filter(({ name }) => wants(name))) {
      signal.throwIfAborted()
      const records = quick ? Math.min(one.records, QUICK_RECORDS) : one.records
      const isSame = journal?.records === records && journal.directory.endsWith(`-${one.diskBytes}`)
      if (!isSame) {
        if (journal !== undefined) rmSync(journal.directory, { recursive: true, force: true })
        journal = await benchJournal({ records, diskBytes: one.diskBytes, diskDirectory, say, signal })
      }
      if (journal !== undefined) figures.push(await measure(one, journal, options))
    }
  } finally {
    if (journal !== undefined) rmSync(journal.directory, { recursive: true, force: true })
  }
  return figures
}

export const bootBench: Bench = { names: cases.map(({ name }) => name), run }
