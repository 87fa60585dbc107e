import { once } from 'node:events'
import { Worker } from 'node:worker_threads'
import { figureOf, type Bench, type BenchOptions, type Figure } from './figure.ts'
import { fio, type FioResult, type Load } from './rig/fio.ts'
import { Nbdkit } from './rig/nbdkit.ts'
import { SourceDisk } from './rig/source-disk.ts'

const SIZE_BYTES = 2 * 1024 ** 3

type Case = { name: string; load: Omit<Load, 'seconds'>; unit: string; of: (result: FioResult) => number; direction: 'more is better' | 'less is better' }

/** The loads that capture and the whole path are measured with. */
export const loads: Record<string, Omit<Load, 'seconds'>> = {
  'randwrite4k.qd1': { rw: 'randwrite', blockBytes: 4096, depth: 1 },
  'randwrite4k.qd32': { rw: 'randwrite', blockBytes: 4096, depth: 32 },
  seqwrite1m: { rw: 'write', blockBytes: 1024 * 1024, depth: 4 },
  'seqwrite4k.qd32': { rw: 'write', blockBytes: 4096, depth: 32 },
}

const cases: Case[] = [
  { name: 'capture.randwrite4k.qd1', load: loads['randwrite4k.qd1'], unit: 'us', of: ({ meanUs }) => meanUs, direction: 'less is better' },
  { name: 'capture.randwrite4k.qd32', load: loads['randwrite4k.qd32'], unit: 'IOPS', of: ({ iops }) => iops, direction: 'more is better' },
  { name: 'capture.seqwrite1m', load: loads.seqwrite1m, unit: 'MiB/s', of: ({ bytesPerSec }) => bytesPerSec / 2 ** 20, direction: 'more is better' },
  { name: 'capture.seqwrite4k.qd32', load: loads['seqwrite4k.qd32'], unit: 'IOPS', of: ({ iops }) => iops, direction: 'more is better' },
]

const startCapture = async (targetPath: string, sizeBytes: number): Promise<Worker> => {
  const worker = new Worker(new URL('./rig/capture-only.js', import.meta.url), { workerData: { targetPath, sizeBytes } })
  await new Promise<void>((resolve, reject) => {
    worker.once('error', reject)
    worker.on('message', ({ is, why }: { is: string; why?: string }) => {
      if (is === 'ready') resolve()
      if (is === 'letGo') process.stderr.write(`capture let go: ${why}\n`)
    })
  })
  return worker
}

/** Capture alone against the same job into `nbdkit null`, the floor that a C target reaches, in alternating rounds. */
const run = async ({ quick, wants, say, scratchDirectory, signal }: BenchOptions): Promise<Figure[]> => {
  const figures: Figure[] = []
  await using source = await SourceDisk.start(scratchDirectory, 'capture', SIZE_BYTES)
  await using nbdkit = await Nbdkit.start(scratchDirectory, 'null', String(SIZE_BYTES))
  const targetPath = `${scratchDirectory}/capture.sock`
  const worker = await startCapture(targetPath, SIZE_BYTES)
  const seconds = quick ? 1 : 4
  try {
    for (const { name, load, unit, of, direction } of cases.filter((one) => wants(one.name))) {
      const rounds = []
      const bare = await fio(source.uri, { ...load, seconds: quick ? 1 : 3 }, { signal })
      for (let round = 0; round < (quick ? 1 : 5); round++) {
        const reference = of(await source.mirrored({ socketPath: nbdkit.socketPath, exportName: '' }, () => fio(source.uri, { ...load, seconds }, { signal })))
        const ours = of(await source.mirrored({ socketPath: targetPath, exportName: 'scsi0' }, () => fio(source.uri, { ...load, seconds }, { signal })))
        rounds.push({ ours, reference })
        say(`${name} round ${round}: ours ${ours.toFixed(1)} ${unit}, nbdkit null ${reference.toFixed(1)}`)
      }
      figures.push({ ...figureOf(name, unit, direction, rounds, 'the same mirror job into nbdkit null'), ...(quick ? { reduced: true } : {}), note: `no job: ${of(bare).toFixed(0)} ${unit}` })
    }
  } finally {
    const exited = once(worker, 'exit')
    worker.postMessage('end')
    await exited
  }
  return figures
}

export const captureBench: Bench = { names: cases.map(({ name }) => name), run }
