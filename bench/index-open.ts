import { rmSync } from 'node:fs'
import { join } from 'node:path'
import { median, type Bench, type BenchOptions, type Figure } from './figure.ts'
import { allocatedBytes, benchJournal, JOURNAL_VM } from './rig/journals.ts'
import { PointSide } from './rig/point-side.ts'

const RECORDS = 1_000_000
const QUICK_RECORDS = 250_000
const DISK_BYTES = 100 * 1024 ** 3
const OPEN_NAME = 'index.open1e6'
const BYTES_NAME = 'index.bytesPerRecord'

/** Opening a long journal, store and recovery point, in a fresh process; and what its index takes on disk. */
const run = async ({ quick, wants, say, scratchDirectory, diskDirectory, signal }: BenchOptions): Promise<Figure[]> => {
  const journal = await benchJournal({ records: quick ? QUICK_RECORDS : RECORDS, diskBytes: DISK_BYTES, diskDirectory, say, signal })
  try {
    const totals: number[] = []
    const stores: number[] = []
    let leafBytes = 0
    let sealedRecords = 0
    let residentBytes = 0
    for (let round = 0; round < (quick ? 1 : 5); round++) {
      signal.throwIfAborted()
      await using points = await PointSide.start(join(scratchDirectory, 'index.sock'))
      const store = await points.ask({ do: 'openStore', vm: JOURNAL_VM, vmDirectory: journal.directory })
      const point = await points.ask({ do: 'open', pointId: 'p', vm: JOURNAL_VM, vmDirectory: journal.directory, seq: journal.lastSeq })
      totals.push(store.tookMs + point.tookMs)
      stores.push(store.tookMs)
      leafBytes = store.journalIndexBytes
      sealedRecords = store.sealedRecords
      residentBytes = Math.max(residentBytes, point.residentBytes)
      say(`${OPEN_NAME} round ${round}: store ${store.tookMs.toFixed(0)} ms, point ${point.tookMs.toFixed(0)} ms`)
    }
    const mergedBytes = allocatedBytes(join(journal.directory, 'runs'))
    const reduced = quick ? { reduced: true } : {}
    const figures: Figure[] = [
      {
        name: OPEN_NAME, value: median(totals), unit: 'ms', reference: null, ratio: null, ...reduced,
        note: `target below 1000 ms; ${journal.records} records: store ${median(stores).toFixed(0)} ms, then its newest point; ${(residentBytes / 2 ** 20).toFixed(0)} MiB resident`,
      },
      {
        name: BYTES_NAME, value: (leafBytes + mergedBytes) / sealedRecords, unit: 'bytes', reference: null, ratio: null, ...reduced,
        note: `target below 40; ${sealedRecords} sealed records: ${(leafBytes / sealedRecords).toFixed(1)} in the segments, ${(mergedBytes / sealedRecords).toFixed(1)} in merged runs`,
      },
    ]
    return figures.filter(({ name }) => wants(name))
  } finally {
    rmSync(journal.directory, { recursive: true, force: true })
  }
}

export const indexBench: Bench = { names: [OPEN_NAME, BYTES_NAME], run }
