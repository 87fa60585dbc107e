import { cpSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { SEGMENT_HEADER_BYTES, encodeSegmentHeader, parseSegmentHeader } from '../../agent/index/index.ts'
import { SegmentSealer, VmStore } from '../../agent/journal/index.ts'
import { readStamp } from '../../agent/proof/index.ts'
import { silentLogger } from '../../core/log/index.ts'
import { FrameBuilder, MAX_FRAME_PAYLOAD_BYTES, MAX_FRAME_RECORDS, RecordKind, adaptiveZstd, decodeFramePayload, hasData, hasJson, parseFrame, type Frame } from '../../core/record/index.ts'

type Stamp = NonNullable<ReturnType<typeof readStamp>>
/** A stamped write in a journal. `disk` is the number in the journal, not the proof's. */
export type JournaledWrite = { seq: number; disk: number; offsetBytes: number; lengthBytes: number; stamp: Stamp }
type Segment = { path: string; framesEndBytes: number }
type Payload = { kind: RecordKind; disk: number; offsetBytes: number; data: Buffer }

/** A copy of one VM's directory, to read records in and to move them about. */
export class JournalCopy {
  readonly vm: string
  readonly directory: string
  /** Checkpoint id -> last sequence of the cut. */
  readonly namedSeqs = new Map<string, number>()
  #segments: Segment[] = []

  private constructor(vm: string, directory: string) {
    this.vm = vm
    this.directory = directory
  }

  static async make(vm: string, fromDirectory: string, directory: string): Promise<JournalCopy> {
    cpSync(fromDirectory, directory, { recursive: true })
    const copy = new JournalCopy(vm, directory)
    await copy.#withStore(async (store) => {
      copy.#segments = store.segments.map(({ path, framesEndBytes }) => ({ path, framesEndBytes }))
      for await (const mark of store.marks()) if (mark.is === 'checkpoint') copy.namedSeqs.set(mark.mark.id, mark.namedSeq)
    })
    return copy
  }

  /** All writes of that run, in journal order. */
  writes(runId: number): JournaledWrite[] {
    const writes: JournaledWrite[] = []
    for (const segment of this.#segments) {
      for (const frame of framesOf(segment)) {
        const raw = decodeFramePayload(frame.header, frame.stored)
        for (let index = 0; index < frame.table.count; index++) {
          if (frame.table.kind(index) !== RecordKind.write) continue
          const { disk, offsetBytes, data } = recordAt(frame, raw, index)
          const stamp = readStamp(data, runId)
          if (stamp !== undefined) writes.push({ seq: frame.header.firstSeq + index, disk, offsetBytes, lengthBytes: data.length, stamp })
        }
      }
    }
    return writes
  }

  /**
   * Puts the record of each of two sequences in the other's place. All frames that change are made again, checksums and all; every segment from
   * the first changed one on is written again without its seal, and the journal itself seals them, in an unbroken chain of digests.
   * @returns damage that a full scrub of the journal finds afterwards: none
   */
  async swap(oneSeq: number, otherSeq: number): Promise<string[]> {
    const one = this.#find(oneSeq)
    const other = this.#find(otherSeq)
    const places = new Map([[oneSeq, other], [otherSeq, one]])
    let changed = false
    for (const segment of this.#segments) {
      const header = parseSegmentHeader(readFileSync(segment.path))
      const frames = framesOf(segment)
      if (frames.some(({ header: { firstSeq, lastSeq } }) => [oneSeq, otherSeq].some((seq) => seq >= firstSeq && seq <= lastSeq))) changed = true
      if (!changed) continue
      const bytes = frames.map((frame) => rebuilt(frame, places))
      writeFileSync(segment.path, Buffer.concat([encodeSegmentHeader({ ...header, previousDigest: Buffer.alloc(32) }), ...bytes]))
    }
    // Merged runs point into the old frames; they are made of what is in the segments, and can be missing.
    rmSync(`${this.directory}/runs`, { recursive: true, force: true })
    return this.#withStore(async (store) => {
      await store.sealingIdle()
      await store.verify()
      return store.damage().map(({ firstSeq, lastSeq, what }) => `${firstSeq}-${lastSeq}: ${what}`)
    })
  }

  #find(seq: number): Payload {
    for (const segment of this.#segments) {
      for (const frame of framesOf(segment)) {
        if (seq < frame.header.firstSeq || seq > frame.header.lastSeq) continue
        return recordAt(frame, decodeFramePayload(frame.header, frame.stored), seq - frame.header.firstSeq)
      }
    }
    throw new Error(`the copy of the journal of VM ${this.vm} has no record ${seq}`)
  }

  async #withStore<T>(work: (store: VmStore) => Promise<T>): Promise<T> {
    await using sealer = new SegmentSealer()
    await using store = await VmStore.open({ directory: this.directory, vm: this.vm, log: silentLogger, clock: { nowUnixMs: Date.now }, sealer })
    return await work(store)
  }
}

const framesOf = ({ path, framesEndBytes }: Segment): Frame[] => {
  const bytes = readFileSync(path).subarray(0, framesEndBytes)
  const frames: Frame[] = []
  for (let at = SEGMENT_HEADER_BYTES; at < bytes.length; ) {
    const frame = parseFrame(bytes, at)
    frames.push(frame)
    at += 64 + frame.header.bodyBytes
  }
  return frames
}

const recordAt = ({ table }: Frame, raw: Buffer, index: number): Payload => {
  const kind = table.kind(index) as RecordKind
  const start = table.payloadOffset(index)
  return { kind, disk: table.disk(index), offsetBytes: table.offsetBytes(index), data: hasData(kind) || hasJson(kind) ? raw.subarray(start, start + table.lengthBytes(index)) : Buffer.alloc(0) }
}

/** The frame with other records in some places. */
const rebuilt = (frame: Frame, places: ReadonlyMap<number, Payload>): Buffer => {
  const { header, table } = frame
  const raw = decodeFramePayload(header, frame.stored)
  const builder = new FrameBuilder(Buffer.alloc(MAX_FRAME_PAYLOAD_BYTES), MAX_FRAME_RECORDS)
  for (let index = 0; index < table.count; index++) {
    const { kind, disk, offsetBytes, data } = places.get(header.firstSeq + index) ?? recordAt(frame, raw, index)
    if (hasJson(kind)) builder.addJson(kind, offsetBytes, data.toString('utf8'))
    else if (hasData(kind)) data.copy(builder.payload, builder.reserveData(kind, disk, offsetBytes, data.length))
    else builder.addRange(kind, disk, offsetBytes, table.lengthBytes(index))
  }
  const { head, payload } = builder.seal({ firstSeq: header.firstSeq, epoch: header.epoch, atUnixMs: header.atUnixMs, flags: header.flags }, adaptiveZstd())
  return Buffer.concat([head, payload])
}
