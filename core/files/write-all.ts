import type { FileHandle } from 'node:fs/promises'
import { CdpError } from '../errors/index.ts'

/** What is longer makes the page cache take memory in pieces of 2 MiB, which a hypervisor may have to find first: three times the CPU time (docs/decisions/journal-writes.md). */
const CALL_BYTES = 1024 * 1024

/**
 * Writes `buffers` one after the other at `offsetBytes`, all of their `lengthBytes`. A short write is followed by one of what is
 * left, which either succeeds or says why not.
 */
export const writeAll = async (handle: FileHandle, buffers: Buffer[], lengthBytes: number, offsetBytes: number): Promise<void> => {
  let done = 0
  while (done < lengthBytes) {
    const isAll = done === 0 && lengthBytes <= CALL_BYTES
    const { bytesWritten } = await handle.writev(isAll ? buffers : cut(buffers, done, done + CALL_BYTES), offsetBytes + done)
    if (bytesWritten === 0) throw new CdpError('IO', 'the operating system wrote nothing and named no error', { context: { offsetBytes: offsetBytes + done } })
    done += bytesWritten
  }
}

/** Views of what stands between two offsets of `buffers`, taken as one. */
const cut = (buffers: readonly Buffer[], fromBytes: number, toBytes: number): Buffer[] => {
  const views: Buffer[] = []
  let start = 0
  for (const buffer of buffers) {
    const end = start + buffer.length
    if (end > fromBytes && start < toBytes) views.push(buffer.subarray(Math.max(0, fromBytes - start), Math.min(buffer.length, toBytes - start)))
    start = end
  }
  return views
}
