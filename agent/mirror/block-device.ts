import { constants } from 'node:fs'
import { open, readFile, stat } from 'node:fs/promises'
import type { FileHandle } from 'node:fs/promises'
import { CdpError, errorCode } from '../../core/errors/index.ts'

const BLANK_BYTES = 1024 * 1024
const PIECE_BYTES = 1024 * 1024
/** Below the device's place in /sys, the first that says something. ZFS volumes have none; their names do not move. */
const IDENTITIES = ['dm/uuid', 'wwid', 'device/wwid', 'serial', 'device/serial', 'loop/backing_file']

export type BlockDevice = { sizeBytes: number; identity: string | undefined }

/** Size and identity of a block device. @throws CdpError NOT_FOUND, BAD_INPUT if it is none */
export const lookAtDevice = async (path: string): Promise<BlockDevice> => {
  const found = await stat(path).catch((cause: unknown) => {
    if (errorCode(cause) !== 'ENOENT') throw cause
    throw new CdpError('NOT_FOUND', `there is no block device ${path}`, { cause, hint: 'Make the volume, or name another one in mirrors of agent.json.', context: { path } })
  })
  if (!found.isBlockDevice()) throw new CdpError('BAD_INPUT', `${path} is no block device`, { hint: 'Name a volume, or use the kind qcow2 or file.', context: { path } })
  const system = `/sys/dev/block/${majorOf(found.rdev)}:${minorOf(found.rdev)}`
  const sizeBytes = Number((await readFile(`${system}/size`, 'utf8')).trim()) * 512
  for (const name of IDENTITIES) {
    const identity = (await readFile(`${system}/${name}`, 'utf8').catch(() => '')).trim()
    if (identity !== '') return { sizeBytes, identity: `${name} ${identity}` }
  }
  return { sizeBytes, identity: undefined }
}

/** Opens a device that nobody else has claimed: neither mounted, nor part of LVM or md, nor another mirror; none of them can take it while it is open. @throws CdpError CONFLICT */
export const holdDevice = async (path: string): Promise<FileHandle> => {
  try {
    return await open(path, constants.O_RDWR | constants.O_EXCL)
  } catch (cause) {
    if (errorCode(cause) !== 'EBUSY') throw cause
    throw new CdpError('CONFLICT', `${path} is in use: mounted, part of another volume, or the mirror of another disk`, { cause, hint: 'Name a volume of its own for this disk.', context: { path } })
  }
}

/** @throws CdpError CONFLICT */
export const mustBeLargeEnough = (path: string, deviceBytes: number, sizeBytes: number): void => {
  if (deviceBytes >= sizeBytes) return
  throw new CdpError('CONFLICT', `${path} has ${deviceBytes} bytes, the disk ${sizeBytes}`, { hint: `Let the volume grow by at least ${sizeBytes - deviceBytes} bytes.`, context: { path, deviceBytes, sizeBytes } })
}

/** The device begins with zeroes: no partition table, file system or volume of anybody. */
export const isBlank = async (device: FileHandle): Promise<boolean> => {
  const head = Buffer.alloc(BLANK_BYTES)
  const { bytesRead } = await device.read(head, 0, head.length, 0)
  return head.subarray(0, bytesRead).equals(Buffer.alloc(bytesRead))
}

/** Afterwards the range reads as zeroes, durably. What does already is not written: that would allocate a thin volume. */
export const zeroRange = async (device: FileHandle, startBytes: number, endBytes: number): Promise<void> => {
  const zeroes = Buffer.alloc(PIECE_BYTES)
  const piece = Buffer.alloc(PIECE_BYTES)
  for (let at = startBytes; at < endBytes; at += PIECE_BYTES) {
    const lengthBytes = Math.min(PIECE_BYTES, endBytes - at)
    const { bytesRead } = await device.read(piece, 0, lengthBytes, at)
    if (!piece.subarray(0, bytesRead).equals(zeroes.subarray(0, bytesRead))) await device.write(zeroes, 0, lengthBytes, at)
  }
  await device.sync()
}

const majorOf = (device: number): number => Math.floor(device / 2 ** 8) % 2 ** 12 + Math.floor(device / 2 ** 44) * 2 ** 12
const minorOf = (device: number): number => (device % 2 ** 8) + (Math.floor(device / 2 ** 20) % 2 ** 24) * 2 ** 8
