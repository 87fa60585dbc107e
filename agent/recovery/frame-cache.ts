import { promisify } from 'node:util'
import { zstdDecompress } from 'node:zlib'
import { Compression, FRAME_HEADER_BYTES, RECORD_ENTRY_BYTES, decodeFramePayload, parseFrameHeader, verifyFrameBody } from '../../core/record/index.ts'
import type { FrameHeader } from '../../core/record/index.ts'
import { CdpError, errorCode, errorMessage } from '../../core/errors/index.ts'
import type { FilePool } from '../index/index.ts'

const decompress = promisify(zstdDecompress)
const LEAST_READ_BYTES = 16 * 1024
const MOST_GUESSED_BYTES = 1280 * 1024
/** Smaller payloads are decompressed at once: a turn of the thread pool costs more. */
const INLINE_DECOMPRESS_BYTES = 32 * 1024

/** Where a frame stands, and which sequences it may have. */
export type FramePlace = { path: string; segment: number; frameOffset: number; firstSeq: number; lastSeq: number }

type Cached = { payload: Buffer; bytes: number }

/**
 * Decoded payloads of frames, least recently used out first, bounded in bytes. A frame is checked from its first byte to
 * its last before anything of it is handed out; several readers of one frame share one load.
 */
export class FrameCache {
  readonly #maxBytes: number
  readonly #cached = new Map<number, Cached>()
  readonly #loading = new Map<number, Promise<Buffer>>()
  readonly #fileIds = new Map<string, number>()
  #bytes = 0
  /** How much is read at first: frames of one journal are often alike. */
  #guessBytes = 64 * 1024
  loads = 0
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
      id = this.#fileIds.size
      this.#fileIds.set(path, id)
    }
    return id
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
      }
      verifyFrameBody(header, buffer, FRAME_HEADER_BYTES)
      const storedAt = FRAME_HEADER_BYTES + header.recordCount * RECORD_ENTRY_BYTES
      const payload = await decode(header, buffer.subarray(storedAt, storedAt + header.payloadStoredBytes))
      this.#keep(key, payload)
      return payload
    } catch (error) {
      if (errorCode(error) !== 'CHECKSUM' && errorCode(error) !== 'FORMAT') throw error
      const { path, segment, frameOffset } = place
      throw new CdpError('JOURNAL_DAMAGED', `segment ${segment} is damaged at byte ${frameOffset}: ${errorMessage(error)}`, {
        cause: error, hint: 'choose a checkpoint before the damage, or let a sync heal it', context: { path, segment, offsetBytes: frameOffset },
      })
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
