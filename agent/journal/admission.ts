import { CdpError } from '../../core/errors/index.ts'
import { FRAME_HEADER_BYTES, parseFrame } from '../../core/record/index.ts'
import type { FrameHeader } from '../../core/record/index.ts'
import { checkRecords, isDirect, marksOf } from './frame-checks.ts'
import type { DiskSizes } from './frame-checks.ts'
import type { QueuedFrame } from './frame-queue.ts'
import type { VmState } from './vm-state.ts'

export const staleEpoch = (epoch: number, newest: number): CdpError =>
  new CdpError('STALE_EPOCH', 'a newer attach of this VM owns the journal', { context: { epoch, newest } })

const protocol = (message: string, { firstSeq, lastSeq }: FrameHeader, receivedSeq: number): CdpError =>
  new CdpError('STREAM_PROTOCOL', message, { context: { firstSeq, lastSeq, receivedSeq } })

/** Decides which frames are taken: those of one epoch, in sequence, in the mode of the VM, inside its disks. No I/O. */
export class Admission {
  /** The epoch whose frames are taken now; undefined until an attach began or went on. */
  takenEpoch: number | undefined
  #newestEpoch = 0
  #receivedSeq = 0
  #baseReceived = false
  #sizes: DiskSizes = new Map()

  get receivedSeq(): number {
    return this.#receivedSeq
  }

  /** Nothing beyond `durableSeq` counts as received. */
  reset(state: VmState, durableSeq: number): void {
    this.takenEpoch = undefined
    this.#newestEpoch = state.epoch
    this.#receivedSeq = durableSeq
    this.#baseReceived = state.baseComplete
    this.#sizes = new Map(state.disks.map(({ disk, sizeBytes }) => [disk, sizeBytes]))
  }

  /**
   * Checks a frame and counts it as received.
   * @returns undefined if it is held already
   * @throws CdpError CHECKSUM, FORMAT, STREAM_PROTOCOL, STALE_EPOCH; nothing changed then
   */
  take(bytes: Buffer): QueuedFrame | undefined {
    const frame = parseFrame(bytes)
    const { header } = frame
    if (bytes.length !== FRAME_HEADER_BYTES + header.bodyBytes) throw new CdpError('FORMAT', 'bytes behind the end of a frame', { context: { bytes: bytes.length } })
    if (header.epoch !== this.takenEpoch) {
      if (header.epoch <= this.#newestEpoch) throw staleEpoch(header.epoch, this.#newestEpoch)
      throw protocol('frame of an epoch that was never given', header, this.#receivedSeq)
    }
    if (header.lastSeq <= this.#receivedSeq) return undefined
    if (header.firstSeq !== this.#receivedSeq + 1) {
      throw protocol(header.firstSeq > this.#receivedSeq ? 'gap in the sequence' : 'frame of which a part is held', header, this.#receivedSeq)
    }
    const direct = isDirect(header)
    if (direct === this.#baseReceived) {
      throw protocol(direct ? 'direct frame after the initial sync' : 'journal frame before the end of the initial sync', header, this.#receivedSeq)
    }
    const marks = marksOf(frame)
    const endsBase = direct && marks?.some((mark) => mark.is === 'syncEnd' && mark.mark.kind === 'initial') === true
    if (endsBase && marks?.at(-1)?.seq !== header.lastSeq) throw protocol('the initial sync must end with its frame', header, this.#receivedSeq)
    const sizes = marks?.some((mark) => mark.is === 'resize') === true ? new Map(this.#sizes) : this.#sizes
    checkRecords(frame, sizes)
    this.#sizes = sizes
    if (endsBase) this.#baseReceived = true
    this.#receivedSeq = header.lastSeq
    return { bytes, frame, marks, direct, endsBase }
  }
}
