import { open, readdir, rm } from 'node:fs/promises'
import type { FileHandle } from 'node:fs/promises'
import { join } from 'node:path'
import { CdpError, errorCode, errorMessage } from '../../core/errors/index.ts'
import { writeAll } from '../../core/files/index.ts'
import { firstSeqOfSegmentFile, parseSegmentHeader, SEGMENT_HEADER_BYTES, SEGMENT_TRAILER_BYTES } from '../index/index.ts'
import type { SegmentHeader, SegmentTrailer } from '../index/index.ts'
import type { DurableHint } from './durable-hint.ts'
import { isDiskMark, marksOf } from './frame-checks.ts'
import type { DiskMark } from './frame-checks.ts'
import { scanFrames } from './frame-scan.ts'
import type { BadStretch, ScanRange } from './frame-scan.ts'
import { DamageList } from './segment-info.ts'
import type { OpenReport, SegmentInfo } from './segment-info.ts'
import { NO_DIGEST, trailerOfFile } from './segment-ends.ts'
import { syncDirectory } from './vm-state.ts'

export type OpenedJournal = {
  segments: SegmentInfo[]
  durableSeq: number
  damage: DamageList
  report: OpenReport
  /** The last segment may be appended to. */
  lastIsOpen: boolean
  /** Resizes that stand in unsealed segments, in order. */
  diskMarks: DiskMark[]
}

type Probe = { path: string; firstSeq: number; fileBytes: number; header: SegmentHeader | undefined; headerProblem: string; trailer: SegmentTrailer | undefined }

/** What stands there; nothing where the disk does not give it any more: a segment without header or trailer is damaged, and not the whole journal. */
const readAt = async (handle: FileHandle, offsetBytes: number, lengthBytes: number): Promise<Buffer> => {
  const buffer = Buffer.alloc(lengthBytes)
  try {
    const { bytesRead } = await handle.read(buffer, 0, lengthBytes, offsetBytes)
    return buffer.subarray(0, bytesRead)
  } catch (error) {
    if (errorCode(error) !== 'EIO') throw error
    return buffer.subarray(0, 0)
  }
}

const orUndefined = <T>(parse: () => T): { value: T | undefined; problem: string } => {
  try {
    return { value: parse(), problem: '' }
  } catch (error) {
    if (!(error instanceof CdpError)) throw error
    return { value: undefined, problem: error.message }
  }
}

const probe = async (path: string, firstSeq: number, vm: string): Promise<Probe> => {
  const handle = await open(path, 'r')
  try {
    const fileBytes = (await handle.stat()).size
    const headerBytes = await readAt(handle, 0, SEGMENT_HEADER_BYTES)
    const { value: header, problem } = orUndefined(() => {
      const parsed = parseSegmentHeader(headerBytes)
      if (parsed.firstSeq !== firstSeq) throw new CdpError('FORMAT', 'segment header contradicts the name of its file')
      if (parsed.vm !== vm) throw new CdpError('FORMAT', 'segment of another VM')
      return parsed
    })
    let trailer: SegmentTrailer | undefined
    if (fileBytes >= SEGMENT_HEADER_BYTES + SEGMENT_TRAILER_BYTES) {
      const trailerBytes = await readAt(handle, fileBytes - SEGMENT_TRAILER_BYTES, SEGMENT_TRAILER_BYTES)
      trailer = orUndefined(() => trailerOfFile(trailerBytes, fileBytes)).value
    }
    return { path, firstSeq, fileBytes, header, headerProblem: problem, trailer }
  } finally {
    await handle.close()
  }
}

const infoOf = (one: Probe, segmentNumber: number): SegmentInfo => ({
  segmentNumber,
  path: one.path,
  firstSeq: one.firstSeq,
  createdAtUnixMs: one.header?.createdAtUnixMs ?? 0,
  lastSeq: one.trailer?.lastSeq ?? one.firstSeq - 1,
  recordCount: one.trailer?.recordCount ?? 0,
  firstAtUnixMs: one.trailer?.firstAtUnixMs ?? 0,
  lastAtUnixMs: one.trailer?.lastAtUnixMs ?? 0,
  framesEndBytes: one.trailer?.runOffsetBytes ?? SEGMENT_HEADER_BYTES,
  runBytes: one.trailer?.runBytes ?? 0,
  fileBytes: one.fileBytes,
  sealed: one.trailer !== undefined,
  damaged: one.header === undefined,
  digest: one.trailer?.digest,
  previousDigest: one.header?.previousDigest ?? NO_DIGEST,
})

/** Opens the journal below one VM's directory: reads headers and trailers, scans what is not sealed, cuts a torn tail. */
export class JournalOpening {
  readonly #directory: string
  readonly #vm: string
  readonly #hint: DurableHint | undefined
  readonly #damage = new DamageList()
  readonly #report: OpenReport = { resealed: [], scannedBytes: 0 }
  readonly #diskMarks: OpenedJournal['diskMarks'] = []

  constructor(directory: string, vm: string, hint: DurableHint | undefined) {
    this.#directory = directory
    this.#vm = vm
    this.#hint = hint
  }

  /** @param baseSeq what the mirror holds: the journal begins with the next sequence at the latest */
  async run(baseSeq: number): Promise<OpenedJournal> {
    const probes = await this.#probeAll()
    const segments = this.#number(probes)
    let durableSeq = baseSeq
    let lastIsOpen = false
    for (const [index, info] of segments.entries()) {
      const { header, headerProblem } = probes[index]
      const isLast = index === segments.length - 1
      if (info.firstSeq > durableSeq + 1) this.#missing(info.segmentNumber, durableSeq + 1, info.firstSeq - 1)
      if (!info.sealed) {
        if (isLast) lastIsOpen = await this.#scanLast(info)
        else await this.#scanClosed(info, segments[index + 1])
      }
      if (header === undefined) this.#addBad(info, { firstSeq: info.firstSeq, lastSeq: Math.max(info.firstSeq, info.lastSeq), what: headerProblem })
      const before = segments[index - 1] as SegmentInfo | undefined
      if (before?.digest !== undefined && header !== undefined && !header.previousDigest.equals(NO_DIGEST) && !header.previousDigest.equals(before.digest)) {
        this.#addBad(before, { firstSeq: before.firstSeq, lastSeq: before.lastSeq, what: 'the hash chain is broken: the segment is not the one that its successor names' })
      }
      durableSeq = Math.max(durableSeq, info.lastSeq)
    }
    if (this.#hint !== undefined && this.#hint.seq > durableSeq) {
      this.#missing(this.#hint.segmentNumber, durableSeq + 1, this.#hint.seq)
      durableSeq = this.#hint.seq
      lastIsOpen = false
    }
    return { segments, durableSeq, damage: this.#damage, report: this.#report, lastIsOpen, diskMarks: this.#diskMarks }
  }

  async #probeAll(): Promise<Probe[]> {
    const firstSeqs = (await readdir(this.#directory)).map((name) => ({ name, firstSeq: firstSeqOfSegmentFile(name) })).filter((one) => one.firstSeq !== undefined)
    firstSeqs.sort((a, b) => (a.firstSeq ?? 0) - (b.firstSeq ?? 0))
    const probes: Probe[] = []
    for (const { name, firstSeq } of firstSeqs) probes.push(await probe(join(this.#directory, name), firstSeq ?? 0, this.#vm))
    const last = probes.at(-1)
    // The header is durable before the first frame is written: a file without frames and without a header was never used.
    if (last !== undefined && last.header === undefined && last.fileBytes <= SEGMENT_HEADER_BYTES && (this.#hint === undefined || this.#hint.seq < last.firstSeq)) {
      await rm(last.path)
      await syncDirectory(this.#directory)
      probes.pop()
      this.#report.tornTail = { segment: this.#numberOf(probes, probes.length), firstSeq: last.firstSeq, lastSeq: undefined, cutBytes: last.fileBytes }
    }
    return probes
  }

  /** The number of a segment whose header is gone follows from its neighbours. */
  #numberOf(probes: Probe[], index: number): number {
    for (let at = index; at >= 0; at--) {
      const header = probes.at(at)?.header
      if (at < probes.length && header !== undefined) return header.segmentNumber + (index - at)
    }
    for (let at = index + 1; at < probes.length; at++) {
      const header = probes[at].header
      if (header !== undefined) return Math.max(0, header.segmentNumber - (at - index))
    }
    return index
  }

  #number(probes: Probe[]): SegmentInfo[] {
    return probes.map((one, index) => infoOf(one, this.#numberOf(probes, index)))
  }

  async #scanClosed(info: SegmentInfo, next: SegmentInfo): Promise<void> {
    const clean = await this.#scan(info, { fromBytes: SEGMENT_HEADER_BYTES, toBytes: info.fileBytes, expectedSeq: info.firstSeq, lastSeq: next.firstSeq - 1 })
    info.lastSeq = next.firstSeq - 1
    info.damaged ||= !clean
    this.#report.resealed.push(info.segmentNumber)
    if (!next.previousDigest.equals(NO_DIGEST)) {
      this.#addBad(info, { firstSeq: info.firstSeq, lastSeq: info.lastSeq, what: 'the segment was sealed and its trailer is damaged' })
    }
  }

  /** @returns true if the segment may be appended to */
  async #scanLast(info: SegmentInfo): Promise<boolean> {
    const hint = this.#hint?.segmentNumber === info.segmentNumber && this.#hint.endBytes > SEGMENT_HEADER_BYTES ? this.#hint : undefined
    let clean = !info.damaged
    if (hint !== undefined) {
      const promised = { fromBytes: SEGMENT_HEADER_BYTES, toBytes: Math.min(hint.endBytes, info.fileBytes), expectedSeq: info.firstSeq, lastSeq: hint.seq }
      if (!(await this.#scan(info, promised))) clean = false
      info.lastSeq = hint.seq
      info.framesEndBytes = Math.min(hint.endBytes, info.fileBytes)
    }
    await this.#scanTail(info)
    if (!clean) info.damaged = true
    return clean
  }

  /**
   * What follows the last promise: whole frames are kept, the first broken one and all behind it are cut. What is kept is written once more: where its fdatasync
   * failed the kernel holds it as clean, and another fdatasync would promise what is on no disk.
   */
  async #scanTail(info: SegmentInfo): Promise<void> {
    const handle = await open(info.path, 'r+')
    try {
      let torn: BadStretch | undefined
      const range = { fromBytes: info.framesEndBytes, toBytes: info.fileBytes, expectedSeq: info.lastSeq + 1 }
      for await (const event of scanFrames(handle, range)) {
        if (event.is === 'bad') torn = event.bad
        else {
          this.#count(info, event.offsetBytes, event.bytes.length, event.frame)
          await writeAll(handle, [event.bytes], event.bytes.length, event.offsetBytes)
        }
      }
      if (info.framesEndBytes > range.fromBytes) await handle.datasync()
      if (info.framesEndBytes >= info.fileBytes) return
      const cutBytes = info.fileBytes - info.framesEndBytes
      await handle.truncate(info.framesEndBytes)
      await handle.datasync()
      info.fileBytes = info.framesEndBytes
      this.#report.tornTail = { segment: info.segmentNumber, firstSeq: info.lastSeq + 1, lastSeq: torn?.lastSeq, cutBytes }
    } finally {
      await handle.close()
    }
  }

  async #scan(info: SegmentInfo, range: ScanRange): Promise<boolean> {
    let clean = true
    const handle = await open(info.path, 'r')
    try {
      for await (const event of scanFrames(handle, range)) {
        if (event.is === 'frame') {
          this.#count(info, event.offsetBytes, event.bytes.length, event.frame)
        } else {
          clean = false
          this.#addBad(info, { firstSeq: event.bad.firstSeq, lastSeq: event.bad.lastSeq ?? event.bad.firstSeq, what: event.bad.what })
        }
      }
    } catch (error) {
      clean = false
      this.#addBad(info, { firstSeq: info.firstSeq, lastSeq: range.lastSeq ?? info.firstSeq, what: `the segment cannot be read: ${errorMessage(error)}` })
    } finally {
      await handle.close()
    }
    return clean
  }

  #count(info: SegmentInfo, offsetBytes: number, lengthBytes: number, frame: Parameters<typeof marksOf>[0]): void {
    const { header } = frame
    if (info.recordCount === 0) info.firstAtUnixMs = header.atUnixMs
    info.lastAtUnixMs = header.atUnixMs
    info.recordCount += header.recordCount
    info.lastSeq = header.lastSeq
    info.framesEndBytes = offsetBytes + lengthBytes
    this.#report.scannedBytes += lengthBytes
    for (const mark of marksOf(frame) ?? []) if (isDiskMark(mark)) this.#diskMarks.push(mark)
  }

  #missing(segment: number, firstSeq: number, lastSeq: number): void {
    this.#damage.add({ segment, firstSeq, lastSeq, what: 'these records are missing' })
  }

  #addBad(info: SegmentInfo, bad: { firstSeq: number; lastSeq: number; what: string }): void {
    this.#damage.add({ segment: info.segmentNumber, ...bad })
  }
}
