import type { FileHandle } from 'node:fs/promises'
import { CdpError } from '../../core/errors/index.ts'

/**
 * Writes `buffers` one after the other at `offsetBytes`, all of their `lengthBytes`. A short write is followed by one of what is
 * left, which either succeeds or says why not.
 */
export const writeAll = async (handle: FileHandle, buffers: Buffer[], lengthBytes: number, offsetBytes: number): Promise<void> => {
  let done = (await handle.writev(buffers, offsetBytes)).bytesWritten
  while (done < lengthBytes) {
    const rest = behind(buffers, done)
    const { bytesWritten } = await handle.writev(rest, offsetBytes + done)
    if (bytesWritten === 0) throw new CdpError('IO', 'the operating system wrote nothing and named no error', { context: { offsetBytes: offsetBytes + done } })
    done += bytesWritten
  }
}

const behind = (buffers: Buffer[], doneBytes: number): Buffer[] => {
  const rest: Buffer[] = []
  let skipped = 0
  for (const buffer of buffers) {
    if (skipped + buffer.length > doneBytes) rest.push(buffer.subarray(Math.max(0, doneBytes - skipped)))
    skipped += buffer.length
  }
  return rest
}
