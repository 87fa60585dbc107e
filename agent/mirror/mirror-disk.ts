import type { DataMap } from './data-map.ts'

/** A mirror disk for reading. Behind its end, and where nothing was written, there are zeroes. */
export type ReadableMirror = AsyncDisposable & {
  /** Fills `target` with what stands at `offsetBytes`. Whole sectors. @throws CdpError or Node's error; nothing is made up */
  read(offsetBytes: number, target: Buffer): Promise<void>
  /** Where data may be, as of now. */
  dataMap(signal?: AbortSignal): Promise<DataMap>
}

/**
 * A mirror disk for writing. One caller; ranges are whole sectors. Nothing is durable before `datasync`, and after any error but BAD_INPUT
 * nothing that was written since the last one counts: dispose, open again, apply again.
 */
export type MirrorDisk = AsyncDisposable & {
  readonly sizeBytes: number
  /** Something was written since the last `datasync`, or is not known to be durable. */
  readonly dirty: boolean
  /** So many writes may be under way at once, if they do not overlap. */
  readonly lanes: number
  /** Writes all of `buffers`, one after the other; they may be reused once it resolves. @throws CdpError BAD_INPUT outside the disk, IO with context.condition 'full' */
  write(offsetBytes: number, buffers: Buffer[], lengthBytes: number): Promise<void>
  /** Afterwards the range reads as zeroes; storage that can takes the space back. */
  zero(offsetBytes: number, lengthBytes: number): Promise<void>
  read(offsetBytes: number, target: Buffer): Promise<void>
  /** Lets the disk grow; it never shrinks, and what is new reads as zeroes. @throws CdpError CONFLICT if the storage below is too small */
  grow(sizeBytes: number): Promise<void>
  datasync(): Promise<void>
}
