import { parseArgs } from 'node:util'
import { mkdir } from 'node:fs/promises'
import { mergeVm } from '../agent/index/index.ts'
import { RecordKind } from '../core/record/index.ts'
import { Random } from '../test/kit/random.ts'
import { VmWriter } from '../test/kit/vm-writer.ts'

export type SyntheticOptions = {
  /** Becomes a VM's directory; must be empty. */
  directory: string
  vm?: string
  records: number
  diskBytes: number
  seed: number
  /** Default 16,384: as many as fill a segment of 64 MiB with writes of 4 KiB. */
  recordsPerSegment?: number
  /** Records of the newest segment that stay unsealed. Default: half a segment. */
  unsealedRecords?: number
  /** Called after each segment. */
  onProgress?: (records: number) => void
}

export type SyntheticJournal = { lastSeq: number; segments: number; elapsedMs: number; mergeMs: number; journalBytes: number; indexBytes: number }

const FRAME_RECORDS = 2048
const WRITE_BYTES = 4096

/**
 * A journal of many 4 KiB writes at random places of one disk, with every run merged that is due. All writes of a frame share
 * one block of data, so 10^8 records need about 10 GB: 24 bytes of record table each, and the index.
 */
export const writeSyntheticJournal = async (options: SyntheticOptions): Promise<SyntheticJournal> => {
  const started = performance.now()
  const { directory, records, diskBytes, recordsPerSegment = 16_384 } = options
  await mkdir(directory, { recursive: true })
  const random = new Random(options.seed)
  const blocks = Math.floor(diskBytes / WRITE_BYTES)
  const unsealed = Math.min(records, options.unsealedRecords ?? recordsPerSegment / 2)
  using writer = new VmWriter({ directory, vm: options.vm ?? '101', disks: [{ disk: 0, key: 'scsi0', sizeBytes: diskBytes }], digests: false }, FRAME_RECORDS)
  const { frame } = writer
  let left = records
  while (left > 0) {
    const room = recordsPerSegment - writer.recordsInSegment
    const inFrame = Math.min(FRAME_RECORDS, left, room, left > unsealed ? left - unsealed : left)
    const at = frame.reserveData(RecordKind.write, 0, placeOf(random, blocks), WRITE_BYTES)
    frame.payload.fill(random.int(1, 256), at, at + WRITE_BYTES)
    // A range of kind write without data of its own points to the start of the payload: the block that stands there.
    for (let n = 1; n < inFrame; n++) frame.addRange(RecordKind.write, 0, placeOf(random, blocks), WRITE_BYTES)
    writer.writeFrame()
    left -= inFrame
    if (writer.recordsInSegment >= recordsPerSegment || left === unsealed) {
      writer.closeSegment()
      writer.sealAll()
      options.onProgress?.(records - left)
    }
  }
  const merging = performance.now()
  const report = await mergeVm(directory)
  const mergedBytes = report.written.reduce((sum, run) => sum + run.runBytes, 0)
  return {
    lastSeq: writer.lastSeq, segments: writer.segmentCount, elapsedMs: performance.now() - started, mergeMs: performance.now() - merging,
    journalBytes: writer.writtenBytes, indexBytes: writer.leafRunBytes + mergedBytes,
  }
}

const placeOf = (random: Random, blocks: number): number => ((random.u32() * 0x10_0000 + (random.u32() >>> 12)) % blocks) * WRITE_BYTES

if (process.argv[1] !== undefined && /synthetic-journal\.[jt]s$/.test(process.argv[1])) {
  const { values } = parseArgs({
    options: {
      directory: { type: 'string' }, records: { type: 'string', default: '1e6' }, disk: { type: 'string', default: '1e12' }, seed: { type: 'string', default: '1' },
      'records-per-segment': { type: 'string', default: '16384' },
    },
  })
  if (values.directory === undefined) {
    process.stderr.write('synthetic-journal: --directory is missing\nhint: name a directory that does not exist yet; --records 1e8 --disk 1e12 --seed 1\n')
    process.exit(1)
  }
  const diskBytes = Math.floor(Number(values.disk) / WRITE_BYTES) * WRITE_BYTES
  let told = performance.now()
  const journal = await writeSyntheticJournal({
    directory: values.directory, records: Number(values.records), diskBytes, seed: Number(values.seed), recordsPerSegment: Number(values['records-per-segment']),
    onProgress: (records) => {
      if (performance.now() - told < 2_000) return
      told = performance.now()
      process.stderr.write(`${records} records\n`)
    },
  })
  process.stdout.write(`${JSON.stringify(journal)}\n`)
}
