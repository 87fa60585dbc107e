import { constants } from 'node:fs'
import { mkdir, open, rm, statfs } from 'node:fs/promises'
import type { FileHandle } from 'node:fs/promises'
import { join } from 'node:path'
import { CdpError, errorCode, errorMessage } from '../../core/errors/index.ts'
import { writeAll } from '../../core/files/index.ts'
import { FRAME_HEADER_BYTES, MAX_FRAME_BYTES, parseFrameHeader, verifyFrameBody } from '../../core/record/index.ts'
import type { SealedFrame } from '../../core/record/index.ts'

export type SpillOptions = {
  /** A directory of this VM alone; everything in it is removed. */
  directory: string
  limitBytes: number
  /** Stays free on the file system. */
  reserveBytes: number
  segmentBytes?: number
  deadlineMs?: number
}

/** `full`: nothing was written, and why. */
export type SpillOutcome = { is: 'written' } | { is: 'full'; why: string }

type Segment = { path: string; handle: FileHandle; writtenBytes: number; readBytes: number }

const SEGMENT_BYTES = 64 * 1024 * 1024
const DEADLINE_MS = 10_000
const NO_SPACE: ReadonlySet<string> = new Set(['ENOSPC', 'EDQUOT'])
const READ_BYTES = Math.max(4 * 1024 * 1024, MAX_FRAME_BYTES)

/**
 * Frames of one VM in files, first in, first out (docs/decisions/spill.md). One operation at a time: the caller waits for each.
 * An operation that misses its deadline is not repeated; until the operating system gives it back, every other is refused.
 */
export class SpillFile implements AsyncDisposable {
  readonly #options: Required<SpillOptions>
  readonly #segments: Segment[] = []
  #bytes = 0
  #nextNumber = 1
  #stuck: string | undefined

  constructor(options: SpillOptions) {
    this.#options = { segmentBytes: SEGMENT_BYTES, deadlineMs: DEADLINE_MS, ...options }
  }

  /** Bytes written and not taken yet. */
  get bytes(): number {
    return this.#bytes
  }

  /** Makes the directory, empty: what an earlier life left there belongs to nobody. */
  prepare(): Promise<void> {
    return this.#timed('preparing', async () => {
      await rm(this.#options.directory, { recursive: true, force: true })
      await mkdir(this.#options.directory, { recursive: true, mode: 0o700 })
    })
  }

  /** Adds frames behind those that are there, all of them or none. @throws CdpError IO, TIMEOUT: what was there cannot be relied upon any more */
  append(frames: readonly SealedFrame[]): Promise<SpillOutcome> {
    return this.#timed('writing', async () => {
      const lengthBytes = frames.reduce((sum, frame) => sum + frame.lengthBytes, 0)
      const { limitBytes } = this.#options
      if (this.#bytes + lengthBytes > limitBytes) return { is: 'full', why: `the spill has reached its limit of ${limitBytes} bytes` }
      const last = this.#segments.at(-1)
      const roomy = last !== undefined && last.writtenBytes + lengthBytes <= this.#options.segmentBytes ? last : undefined
      if (roomy === undefined) {
        const why = await this.#noRoomFor(Math.max(this.#options.segmentBytes, lengthBytes))
        if (why !== undefined) return { is: 'full', why }
      }
      try {
        await writeFrames(roomy ?? (await this.#begin()), frames, lengthBytes)
      } catch (error) {
        if (!NO_SPACE.has(errorCode(error) ?? '')) throw error
        // Somebody else took the room. What was written of these frames lies behind the end, as if it were not there.
        if (this.#segments.at(-1)?.writtenBytes === 0) await this.#remove(this.#segments.pop())
        return { is: 'full', why: `the file system of ${this.#options.directory} is full` }
      }
      this.#bytes += lengthBytes
      return { is: 'written' }
    })
  }

  /** The next frames, in order, checked; none if nothing is left. @throws CdpError CHECKSUM, FORMAT, IO, TIMEOUT */
  take(): Promise<SealedFrame[]> {
    return this.#timed('reading', async () => {
      const [segment] = this.#segments
      if (segment === undefined) return []
      const chunk = Buffer.allocUnsafeSlow(Math.min(READ_BYTES, segment.writtenBytes - segment.readBytes))
      await readAll(segment, chunk)
      const frames = framesIn(chunk)
      const lengthBytes = frames.reduce((sum, frame) => sum + frame.lengthBytes, 0)
      segment.readBytes += lengthBytes
      this.#bytes -= lengthBytes
      if (segment.readBytes === segment.writtenBytes) await this.#remove(this.#segments.shift())
      return frames
    })
  }

  /** Forgets everything. */
  clear(): Promise<void> {
    return this.#timed('clearing', async () => {
      this.#bytes = 0
      while (this.#segments.length > 0) await this.#remove(this.#segments.shift())
    })
  }

  /** Removes the files, if the storage lets us: what is left is removed by the next life's `prepare`. */
  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#stuck !== undefined) return
    await this.clear().catch((error: unknown) => process.emitWarning(errorMessage(error), { code: 'CDP_SPILL' }))
  }

  async #begin(): Promise<Segment> {
    const path = join(this.#options.directory, `${this.#nextNumber++}.spill`)
    const handle = await open(path, constants.O_RDWR | constants.O_CREAT | constants.O_EXCL, 0o600)
    const segment = { path, handle, writtenBytes: 0, readBytes: 0 }
    this.#segments.push(segment)
    return segment
  }

  async #remove(segment: Segment | undefined): Promise<void> {
    await segment?.handle.close()
    if (segment !== undefined) await rm(segment.path, { force: true })
  }

  async #noRoomFor(lengthBytes: number): Promise<string | undefined> {
    const { directory, reserveBytes } = this.#options
    const { bavail, bsize } = await statfs(directory)
    return bavail * bsize - lengthBytes < reserveBytes ? `the file system of ${directory} must keep ${reserveBytes} bytes free` : undefined
  }

  /** Runs one operation with the deadline. */
  async #timed<T>(what: string, operation: () => Promise<T>): Promise<T> {
    const hint = 'Look at the storage below the spill directory, or move it (spill.directory).'
    if (this.#stuck !== undefined) throw new CdpError('IO', `the storage of the spill hangs: ${this.#stuck} has not come back`, { hint })
    const { deadlineMs } = this.#options
    const { promise: late, reject } = Promise.withResolvers<never>()
    const timer = setTimeout(() => {
      this.#stuck = what
      reject(new CdpError('TIMEOUT', `${what} the spill took longer than ${deadlineMs} ms`, { hint }))
    }, deadlineMs)
    const running = operation().catch((error: unknown) => {
      throw error instanceof CdpError ? error : new CdpError('IO', `${what} the spill failed: ${errorMessage(error)}`, { cause: error, hint })
    })
    try {
      return await Promise.race([running, late])
    } finally {
      clearTimeout(timer)
      if (this.#stuck === what) running.then(() => this.#unstick(), () => this.#unstick())
    }
  }

  #unstick(): void {
    this.#stuck = undefined
  }
}

const writeFrames = async (segment: Segment, frames: readonly SealedFrame[], lengthBytes: number): Promise<void> => {
  await writeAll(segment.handle, frames.flatMap(({ head, payload }) => (payload.length > 0 ? [head, payload] : [head])), lengthBytes, segment.writtenBytes)
  segment.writtenBytes += lengthBytes
}

const readAll = async ({ handle, readBytes }: Segment, chunk: Buffer): Promise<void> => {
  for (let done = 0; done < chunk.length; ) {
    const { bytesRead } = await handle.read(chunk, done, chunk.length - done, readBytes + done)
    if (bytesRead === 0) throw new CdpError('IO', 'a spill file is shorter than what was written')
    done += bytesRead
  }
}

/** The whole frames at the beginning of a chunk, views into it; at least one. @throws CdpError CHECKSUM, FORMAT */
const framesIn = (chunk: Buffer): SealedFrame[] => {
  const frames: SealedFrame[] = []
  for (let at = 0; at + FRAME_HEADER_BYTES <= chunk.length; ) {
    const header = parseFrameHeader(chunk, at)
    const lengthBytes = FRAME_HEADER_BYTES + header.bodyBytes
    if (at + lengthBytes > chunk.length) break
    verifyFrameBody(header, chunk, at + FRAME_HEADER_BYTES)
    const payloadAt = at + lengthBytes - header.payloadStoredBytes
    frames.push({ firstSeq: header.firstSeq, lastSeq: header.lastSeq, head: chunk.subarray(at, payloadAt), payload: chunk.subarray(payloadAt, at + lengthBytes), lengthBytes })
    at += lengthBytes
  }
  if (frames.length === 0) throw new CdpError('FORMAT', 'a spill file ends in the middle of a frame')
  return frames
}
