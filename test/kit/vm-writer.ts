import { createHash } from 'node:crypto'
import { closeSync, fstatSync, mkdirSync, openSync, readSync, truncateSync, writeFileSync, writeSync } from 'node:fs'
import { join } from 'node:path'
import { RecordList, buildLeafRun, encodeSegmentHeader, encodeSegmentTrailer, segmentFileName } from '../../agent/index/index.ts'
import { FrameBuilder, parseFrame } from '../../core/record/index.ts'
import type { Compressor, DiskEntry } from '../../core/record/index.ts'

export type VmWriterOptions = { directory: string; vm: string; disks: DiskEntry[]; compress?: Compressor; /** SHA-256 over each segment, as the format asks. Default true. */ digests?: boolean }

type OpenSegment = { number: number; fd: number; records: RecordList; offsetBytes: number; recordCount: number }

/**
 * Writes the files of one VM as docs/format.md says, without an agent: histories for tests and benches. Synchronous; sealing is
 * a call of its own, so that a test chooses when.
 */
export class VmWriter {
  readonly directory: string
  readonly frame: FrameBuilder
  nextSeq = 1
  /** Bytes of frames, and of leaf runs, so far. */
  writtenBytes = 0
  leafRunBytes = 0
  readonly #options: VmWriterOptions
  #segment: OpenSegment | undefined
  #segments = 0
  readonly #unsealed: OpenSegment[] = []

  constructor(options: VmWriterOptions, maxRecords = 4096) {
    this.#options = options
    this.directory = options.directory
    this.frame = new FrameBuilder(Buffer.alloc(4 * 1024 * 1024), maxRecords)
    for (const name of ['journal', 'runs', 'mirror']) mkdirSync(join(this.directory, name), { recursive: true })
    for (const { disk, sizeBytes } of options.disks) {
      const path = this.mirrorPath(disk)
      closeSync(openSync(path, 'a'))
      truncateSync(path, sizeBytes)
    }
    this.setBase(0)
  }

  mirrorPath(disk: number): string {
    return join(this.directory, 'mirror', `${disk}.raw`)
  }

  setBase(baseSeq: number): void {
    const { vm, disks } = this.#options
    writeFileSync(join(this.directory, 'vm.json'), JSON.stringify({ format: 1, vm, epoch: 1, baseComplete: true, baseSeq, directSeq: baseSeq, syncProgress: {}, disks }))
  }

  get segmentCount(): number {
    return this.#segments
  }

  get lastSeq(): number {
    return this.nextSeq - 1
  }

  /** Appends what was put into `frame` and empties it. */
  writeFrame(): void {
    if (this.frame.recordCount === 0) return
    const segment = (this.#segment ??= this.#newSegment())
    const { head, payload, lengthBytes, firstSeq, lastSeq } = this.frame.seal({ firstSeq: this.nextSeq, epoch: 1, atUnixMs: 1, flags: 0 }, this.#options.compress)
    const bytes = Buffer.concat([head, payload])
    segment.records.addFrame(parseFrame(bytes).table, firstSeq, segment.offsetBytes)
    segment.recordCount += this.frame.recordCount
    writeSync(segment.fd, bytes, 0, lengthBytes, segment.offsetBytes)
    segment.offsetBytes += lengthBytes
    this.writtenBytes += lengthBytes
    this.nextSeq = lastSeq + 1
    this.frame.reset()
  }

  get recordsInSegment(): number {
    return this.#segment?.recordCount ?? 0
  }

  /** Ends the segment; the next frame begins a new one. It stays unsealed until `sealAll`. */
  closeSegment(): void {
    if (this.#segment !== undefined) this.#unsealed.push(this.#segment)
    this.#segment = undefined
  }

  /** Seals all segments that are closed. */
  sealAll(): void {
    for (const segment of this.#unsealed.splice(0)) {
      const run = buildLeafRun(segment.records)
      this.leafRunBytes += run.length
      const trailer = encodeSegmentTrailer({
        lastSeq: segment.records.lastSeq, runOffsetBytes: segment.offsetBytes, runBytes: run.length, recordCount: segment.recordCount,
        firstAtUnixMs: 1, lastAtUnixMs: 1, digest: this.#options.digests === false ? Buffer.alloc(32) : digestOf(segment.fd, segment.offsetBytes),
      })
      writeSync(segment.fd, run, 0, run.length, segment.offsetBytes)
      writeSync(segment.fd, trailer, 0, trailer.length, segment.offsetBytes + run.length)
      closeSync(segment.fd)
    }
  }

  [Symbol.dispose](): void {
    this.closeSegment()
    for (const segment of this.#unsealed.splice(0)) closeSync(segment.fd)
  }

  #newSegment(): OpenSegment {
    const number = this.#segments++
    const fd = openSync(join(this.directory, 'journal', segmentFileName(this.nextSeq)), 'w+')
    const header = encodeSegmentHeader({ firstSeq: this.nextSeq, createdAtUnixMs: 1, segmentNumber: number, previousDigest: Buffer.alloc(32), vm: this.#options.vm })
    writeSync(fd, header, 0, header.length, 0)
    return { number, fd, records: new RecordList(number, this.nextSeq), offsetBytes: header.length, recordCount: 0 }
  }
}

const digestOf = (fd: number, lengthBytes: number): Buffer => {
  const bytes = Buffer.alloc(Math.min(lengthBytes, fstatSync(fd).size))
  readSync(fd, bytes, 0, bytes.length, 0)
  return createHash('sha256').update(bytes).digest()
}
