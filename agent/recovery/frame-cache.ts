import { promisify } from 'node:util'
import { zstdDecompress } from 'node:zlib'
import { Compression, FRAME_HEADER_BYTES, RECORD_ENTRY_BYTES, decodeFramePayload, parseFrameHeader, verifyFrameBody } from '../../core/record/index.ts'
import type { FrameHeader } from '../../core/record/index.ts'
import { CdpError, errorCode, errorMessage } from '../../core/errors/index.ts'
import type { FilePool } from '../index/index.ts'
import { blocksAround, sumBlocks, verifyBlocks } from './block-sums.ts'
import type { PayloadSums } from './block-sums.ts'

const decompress = promisify(zstdDecompress)
const LEAST_READ_BYTES = 16 * 1024
const MOST_GUESSED_BYTES = 1280 * 1024
/** Of smaller frames a part is never read: the whole is as fast. */
const LEAST_SUMMED_BYTES = 64 * 1024
/** A part is read by itself if it is less than this share of its frame. */
const PART = 8
const MAX_SUMS_BYTES = 16 * 1024 * 1024
/** Smaller payloads are decompressed at once: a turn of the thread pool costs more. */
const INLINE_DECOMPRESS_BYTES = 32 * 1024

/** Where a frame stands, and which sequences it may have. */
export type FramePlace = { path: string; segment: number; frameOffset: number; firstSeq: number; lastSeq: number }

type Cached = { payload: Buffer; bytes: number }

/**
 * Decoded payloads of frames, least recently used out first, bounded in bytes. A frame is checked from its first byte to
 * its last before anything of it is handed out; several readers of one frame share one load. Of a large frame that is stored
 * as it is, sums of its blocks are kept when it goes, so that later a few of its sectors can be read and checked by themselves.
 */
export class FrameCache {
  readonly #maxBytes: number
  readonly #cached = new Map<number, Cached>()
  readonly #loading = new Map<number, Promise<Buffer>>()
  readonly #sums = new Map<number, PayloadSums>()
  #sumsBytes = 0
  readonly #fileIds = new Map<string, number>()
  #nextFileId = 0
  #bytes = 0
  /** How much is read at first: frames of one journal are often alike. */
  #guessBytes = 64 * 1024
  loads = 0
  /** Reads of a part of a frame. */
  parts = 0
  hits = 0

  constructor(maxBytes: number) {
    this.#maxBytes = maxBytes
  }

  get sizeBytes(): number {
    return this.#bytes
  }

  get maxBytes(): number {
    return this.#maxBytes
  }

  /** A number for a segment's file, the high part of `key`. */
  fileId(path: string): number {
    let id = this.#fileIds.get(path)
    if (id === undefined) {
      id = this.#nextFileId++
      this.#fileIds.set(path, id)
    }
    return id
  }

  /** The files below a directory are gone: others that come under their names get numbers of their own. */
  forgetUnder(directory: string): void {
    for (const path of this.#fileIds.keys()) if (path.startsWith(`${directory}/`)) this.#fileIds.delete(path)
  }

  key(fileId: number, frameOffset: number): number {
    return fileId * 0x1_0000_0000 + frameOffset
  }

  /** The raw payload, if it is at hand. */
  get(key: number): Buffer | undefined {
    const cached = this.#cached.get(key)
    if (cached === undefined) return undefined
    this.hits++
    this.#cached.delete(key)
    this.#cached.set(key, cached)
    return cached.payload
  }

  /**
   * `lengthBytes` of the raw payload of a frame from `payloadOffset` on; to be copied or sent at once, for it is often a view of all of it.
   * @throws CdpError JOURNAL_DAMAGED if the frame is not what was written; Node's ENOENT if its segment is gone
   */
  async loadPart(key: number, place: FramePlace, files: FilePool, payloadOffset: number, lengthBytes: number): Promise<Buffer> {
    const known = this.#cached.has(key) || this.#loading.has(key) ? undefined : this.#sums.get(key)
    if (known !== undefined && lengthBytes * PART < known.payloadBytes && payloadOffset + lengthBytes <= known.payloadBytes) {
      this.parts++
      const { startBytes, endBytes } = blocksAround(known, payloadOffset, lengthBytes)
      try {
        const blocks = Buffer.allocUnsafeSlow(endBytes - startBytes)
        const bytes = await files.read(place.path, blocks, known.payloadAtBytes + startBytes)
        verifyBlocks(known, blocks.subarray(0, bytes), startBytes)
        if (bytes < blocks.length) throw new CdpError('FORMAT', 'frame is cut short')
        return blocks.subarray(payloadOffset - startBytes, payloadOffset - startBytes + lengthBytes)
      } catch (error) {
        throw asDamage(error, place)
      }
    }
    const payload = await this.load(key, place, files)
    if (payloadOffset + lengthBytes > payload.length) throw asDamage(new CdpError('FORMAT', 'the index points behind the end of the frame'), place)
    return payload.subarray(payloadOffset, payloadOffset + lengthBytes)
  }

  /**
   * The raw payload of a frame.
   * @throws CdpError JOURNAL_DAMAGED if the frame is not what was written; Node's ENOENT if its segment is gone
   */
  async load(key: number, place: FramePlace, files: FilePool): Promise<Buffer> {
    const present = this.get(key)
    if (present !== undefined) return present
    let loading = this.#loading.get(key)
    if (loading === undefined) {
      loading = this.#load(key, place, files).finally(() => this.#loading.delete(key))
      this.#loading.set(key, loading)
    }
    return loading
  }

  async #load(key: number, place: FramePlace, files: FilePool): Promise<Buffer> {
    this.loads++
    try {
      let buffer = Buffer.allocUnsafeSlow(this.#guessBytes)
      const bytes = await files.read(place.path, buffer, place.frameOffset)
      buffer = buffer.subarray(0, bytes)
      const header = parseFrameHeader(buffer)
      if (header.firstSeq < place.firstSeq || header.lastSeq > place.lastSeq) throw new CdpError('FORMAT', `a frame with sequence ${header.firstSeq} stands in the wrong place`)
      const wanted = FRAME_HEADER_BYTES + header.bodyBytes
      this.#guessBytes = Math.min(MOST_GUESSED_BYTES, Math.max(LEAST_READ_BYTES, Math.ceil(wanted / 4096) * 4096))
      if (wanted > bytes) {
        const whole = Buffer.allocUnsafeSlow(wanted)
        buffer.copy(whole)
        const rest = await files.read(place.path, whole.subarray(bytes), place.frameOffset + bytes)
        buffer = whole.subarray(0, bytes + rest)
      } else if (wanted * 2 < buffer.buffer.byteLength) {
        // The guess was far too high: the rest of the buffer must not stay in memory with the frame.
        buffer = Buffer.from(buffer.subarray(0, wanted))
      }
      verifyFrameBody(header, buffer, FRAME_HEADER_BYTES)
      const storedAt = FRAME_HEADER_BYTES + header.recordCount * RECORD_ENTRY_BYTES
      const payload = await decode(header, buffer.subarray(storedAt, storedAt + header.payloadStoredBytes))
      this.#keep(key, payload)
      if (header.compression === Compression.stored && payload.length >= LEAST_SUMMED_BYTES) this.#keepSums(key, sumBlocks(payload, place.frameOffset + storedAt))
      return payload
    } catch (error) {
      throw asDamage(error, place)
    }
  }

  #keepSums(key: number, sums: PayloadSums): void {
    if (this.#sums.has(key)) return
    this.#sums.set(key, sums)
    this.#sumsBytes += sumsMemory(sums)
    for (const [oldKey, old] of this.#sums) {
      if (this.#sumsBytes <= MAX_SUMS_BYTES) break
      this.#sums.delete(oldKey)
      this.#sumsBytes -= sumsMemory(old)
    }
  }

  #keep(key: number, payload: Buffer): void {
    // A stored payload is a view: what it keeps alive is the whole buffer that was read.
    const bytes = payload.buffer.byteLength
    if (bytes > this.#maxBytes) return
    this.#cached.set(key, { payload, bytes })
    this.#bytes += bytes
    for (const [oldKey, old] of this.#cached) {
      if (this.#bytes <= this.#maxBytes) break
      this.#cached.delete(oldKey)
      this.#bytes -= old.bytes
    }
  }
}

const sumsMemory = (sums: PayloadSums): number => sums.sums.byteLength + 200

const asDamage = (error: unknown, { path, segment, frameOffset }: FramePlace): unknown =>
  errorCode(error) !== 'CHECKSUM' && errorCode(error) !== 'FORMAT'
    ? error
    : new CdpError('JOURNAL_DAMAGED', `segment ${segment} is damaged at byte ${frameOffset}: ${errorMessage(error)}`, {
        cause: error, hint: 'choose a checkpoint before the damage, or let a sync heal it', context: { path, segment, offsetBytes: frameOffset },
      })

const decode = async (header: FrameHeader, stored: Buffer): Promise<Buffer> => {
  if (header.compression === Compression.stored || header.payloadRawBytes <= INLINE_DECOMPRESS_BYTES) return decodeFramePayload(header, stored)
  let raw: Buffer
  try {
    raw = await decompress(stored, { maxOutputLength: header.payloadRawBytes })
  } catch (cause) {
    throw new CdpError('FORMAT', 'frame payload does not decompress', { cause })
  }
  if (raw.length !== header.payloadRawBytes) throw new CdpError('FORMAT', 'frame payload decompresses to another size')
  return raw
}
