import type { Socket } from 'node:net'
import { errorMessage } from '../../core/errors/index.ts'
import * as nbd from '../../core/nbd/index.ts'
import { RecordKind, SECTOR_BYTES } from '../../core/record/index.ts'
import type { DiskEntry } from '../../core/record/index.ts'
import type { SlabPool } from '../buffer/index.ts'
import type { AckMeter } from './ack-meter.ts'
import { isLargeWrite } from './recorder.ts'
import type { Recorder } from './recorder.ts'

export const MAX_WRITE_BYTES = 1024 * 1024
const REPLIES_PER_BUFFER = 512
/** Payloads with so much left are read straight into their slab. */
const DIRECT_READ_BYTES = 16 * 1024

/** A disk as capture sees it. `capturedBytes` grows with writes and zeroes (what QEMU counts as written), never with discards. `lastAtMs`: when it did last, monotonic. */
export type CapturedDisk = DiskEntry & { capturedBytes: number; lastAtMs: number }

/** What a connection needs of the capture target around it. */
export type ConnectionHost = {
  recorder: Recorder
  slabs: SlabPool
  meter: AckMeter
  /** Stamps the batch that was just parsed with the group clock; after its last request arrived, before its first acknowledgement. */
  stampBatch(): void
  /** True while acknowledgements are held for a group cut over several nodes. */
  holding(): boolean
  /** Cuts the range out of sync reads that are under way. */
  cutFromReads(disk: number, offsetBytes: number, lengthBytes: number): void
  /** A request was answered with an error. QEMU's job stands still then, and nothing more comes of it. */
  onRefused?(key: string): void
}

/**
 * The transmission phase of one NBD connection from QEMU's mirror job: each request becomes a record, and is acknowledged at once.
 * This is the guest's path: nothing here allocates, waits or logs per request.
 */
export class CaptureConnection implements nbd.RequestSink {
  readonly #socket: Socket
  readonly #disk: CapturedDisk
  readonly #host: ConnectionHost
  readonly #parser: nbd.RequestParser
  #staging: Buffer | undefined
  #stagedBytes = 0
  #type = 0
  #cookieHigh = 0
  #cookieLow = 0
  #offsetBytes = 0
  #lengthBytes = 0
  #inBounds = false
  #replies = Buffer.allocUnsafeSlow(REPLIES_PER_BUFFER * nbd.SIMPLE_REPLY_BYTES)
  #replyBytes = 0
  #arrivedMs = 0
  #heldSinceMs = 0
  #clean = false
  #refused = false

  constructor(socket: Socket, disk: CapturedDisk, host: ConnectionHost) {
    this.#socket = socket
    this.#disk = disk
    this.#host = host
    this.#parser = new nbd.RequestParser(this, { maxPayloadBytes: MAX_WRITE_BYTES })
  }

  /** True once the client has said goodbye (NBD_CMD_DISC) between two requests. */
  get saidGoodbye(): boolean {
    return this.#clean
  }

  /** It said goodbye, and nothing that it asked for was refused. */
  get endedCleanly(): boolean {
    return this.#clean && !this.#refused
  }

  /** True if a request was answered with an error. */
  get refused(): boolean {
    return this.#refused
  }

  /** Milliseconds since the last bytes came, while a request is only half here: QEMU holds the guest's write until we answer it. 0 between requests. */
  stalledMs(nowMs: number): number {
    return this.#parser.atRequestBoundary ? 0 : nowMs - this.#arrivedMs
  }

  /** Bytes up to `end` of `chunk` have arrived. @throws CdpError NBD_PROTOCOL: the connection is to be closed */
  receive(chunk: Buffer, end: number): void {
    this.#arrivedMs = performance.now()
    this.#parser.push(chunk, 0, end)
    this.#finishBatch()
  }

  /**
   * Where the rest of a large payload is to be read to, straight from the socket into the slab that its frame will keep; undefined
   * while no large payload is under way.
   */
  placeForPayload(): Buffer | undefined {
    const pendingBytes = this.#parser.payloadPendingBytes
    if (pendingBytes < DIRECT_READ_BYTES || !this.#inBounds) return undefined
    this.#staging ??= this.#host.slabs.take()
    return this.#staging.subarray(this.#stagedBytes, this.#stagedBytes + pendingBytes)
  }

  /** So many bytes were read to where `placeForPayload` said. */
  receivePlaced(lengthBytes: number): void {
    this.#arrivedMs = performance.now()
    this.#stagedBytes += lengthBytes
    this.#parser.advancePayload(lengthBytes)
    this.#finishBatch()
  }

  /** Sends what was held. */
  releaseHeld(): void {
    if (this.#replyBytes === 0) return
    this.#arrivedMs = this.#heldSinceMs
    this.#sendReplies(true)
  }

  onRequest(type: number, _flags: number, cookieHigh: number, cookieLow: number, offsetBytes: number, lengthBytes: number): void {
    this.#type = type
    this.#cookieHigh = cookieHigh
    this.#cookieLow = cookieLow
    this.#offsetBytes = offsetBytes
    this.#lengthBytes = lengthBytes
    this.#stagedBytes = 0
    this.#inBounds =
      lengthBytes > 0 && offsetBytes + lengthBytes <= this.#disk.sizeBytes && offsetBytes % SECTOR_BYTES === 0 && lengthBytes % SECTOR_BYTES === 0
  }

  onPayload(chunk: Buffer, start: number, end: number): void {
    if (!this.#inBounds) return
    const lengthBytes = end - start
    if (lengthBytes === this.#lengthBytes && !isLargeWrite(lengthBytes)) {
      this.#host.recorder.write(this.#disk.disk, this.#offsetBytes, chunk, start, end)
    } else {
      this.#staging ??= this.#host.slabs.take()
      chunk.copy(this.#staging, this.#stagedBytes, start, end)
      this.#stagedBytes += lengthBytes
    }
  }

  onRequestEnd(): void {
    const error = this.#record()
    if (this.#type === nbd.NBD_CMD_DISC) return
    if (error !== 0) this.#refuse()
    if (this.#replyBytes === this.#replies.length) this.#growReplies()
    nbd.writeSimpleReply(this.#replies, this.#replyBytes, error, this.#cookieHigh, this.#cookieLow)
    this.#replyBytes += nbd.SIMPLE_REPLY_BYTES
  }

  #refuse(): void {
    this.#refused = true
    this.#host.onRefused?.(this.#disk.key)
  }

  /** Turns the complete request into a record; returns the NBD error to answer, 0 for success. */
  #record(): number {
    const { recorder } = this.#host
    const { disk } = this.#disk
    switch (this.#type) {
      case nbd.NBD_CMD_WRITE:
        if (!this.#inBounds) return nbd.NBD_EINVAL
        if (this.#stagedBytes > 0) this.#recordStaged()
        break
      case nbd.NBD_CMD_WRITE_ZEROES:
        if (!this.#inBounds) return nbd.NBD_EINVAL
        recorder.range(RecordKind.zero, disk, this.#offsetBytes, this.#lengthBytes)
        break
      case nbd.NBD_CMD_TRIM:
        if (!this.#inBounds) return nbd.NBD_EINVAL
        recorder.range(RecordKind.discard, disk, this.#offsetBytes, this.#lengthBytes)
        break
      case nbd.NBD_CMD_FLUSH:
        return 0
      case nbd.NBD_CMD_DISC:
        this.#clean = true
        return 0
      default:
        return nbd.NBD_EINVAL
    }
    this.#host.cutFromReads(disk, this.#offsetBytes, this.#lengthBytes)
    if (this.#type !== nbd.NBD_CMD_TRIM) this.#disk.capturedBytes += this.#lengthBytes
    this.#disk.lastAtMs = this.#arrivedMs
    return 0
  }

  #recordStaged(): void {
    const staging = this.#staging
    if (staging === undefined) return
    if (isLargeWrite(this.#lengthBytes)) {
      this.#staging = undefined
      this.#host.recorder.takeLarge(RecordKind.write, this.#disk.disk, this.#offsetBytes, this.#lengthBytes, staging)
    } else {
      this.#host.recorder.write(this.#disk.disk, this.#offsetBytes, staging, 0, this.#lengthBytes)
    }
  }

  #finishBatch(): void {
    if (this.#replyBytes === 0) return
    this.#host.stampBatch()
    if (this.#host.holding()) {
      if (this.#heldSinceMs === 0) this.#heldSinceMs = this.#arrivedMs
      return
    }
    this.#sendReplies(false)
  }

  #sendReplies(held: boolean): void {
    const replyBytes = this.#replyBytes
    this.#replyBytes = 0
    this.#heldSinceMs = 0
    this.#socket.write(this.#replies.subarray(0, replyBytes), reportWriteError)
    // What the kernel did not take at once still reads from the buffer: leave that one to it.
    if (this.#socket.writableLength > 0) this.#replies = Buffer.allocUnsafeSlow(REPLIES_PER_BUFFER * nbd.SIMPLE_REPLY_BYTES)
    this.#host.meter.add((performance.now() - this.#arrivedMs) * 1000, replyBytes / nbd.SIMPLE_REPLY_BYTES, held)
  }

  #growReplies(): void {
    const larger = Buffer.allocUnsafeSlow(this.#replies.length * 2)
    this.#replies.copy(larger)
    this.#replies = larger
  }
}

/** A failed write ends the connection by the socket's own 'error' and 'close'; nothing is left to do here. */
const reportWriteError = (error: Error | null | undefined): void => {
  if (error) process.emitWarning(`capture socket: ${errorMessage(error)}`, { code: 'CDP_CAPTURE_SOCKET' })
}
