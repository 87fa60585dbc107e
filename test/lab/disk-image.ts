import { rmSync } from 'node:fs'
import { runTool, tool } from './process.ts'

/** A sparse image with ext4 on it; `fromDir` is copied into it. */
export const makeExt4Image = async (path: string, sizeBytes: number, options: { format?: 'raw' | 'qcow2'; fromDir?: string } = {}): Promise<void> => {
  const { format = 'raw', fromDir } = options
  const raw = format === 'raw' ? path : `${path}.raw`
  await makeBlankImage(raw, sizeBytes)
  await tool('mke2fs', ['-q', '-F', '-t', 'ext4', ...(fromDir ? ['-d', fromDir] : []), raw])
  if (format === 'raw') return
  await tool('qemu-img', ['convert', '-f', 'raw', '-O', 'qcow2', raw, path])
  rmSync(raw)
}

/** A sparse raw image of zeros. */
export const makeBlankImage = async (path: string, sizeBytes: number): Promise<void> => {
  rmSync(path, { force: true })
  await tool('truncate', ['-s', String(sizeBytes), path])
}

/**
 * A qcow2 overlay over an NBD export of raw data, 'nbd+unix:///EXPORT?socket=PATH': what a guest is started from at the recovery side.
 * With a size given the export need not be there yet.
 */
export const createOverlay = async (path: string, nbdUri: string, sizeBytes: number): Promise<void> => {
  await tool('qemu-img', ['create', '-q', '-u', '-f', 'qcow2', '-F', 'raw', '-b', nbdUri, path, String(sizeBytes)])
}

export type Ext4Report = {
  /** Consistent: after the replay of its own journal if that was needed, without any repair. */
  clean: boolean
  /** The journal had to be replayed: the file system was in use when the image was taken. */
  replayed: boolean
  report: string
}

/**
 * Examines the ext4 of a raw or qcow2 image (a file, or an NBD URI with format raw) on a copy below `scratchDir`; the image is not written.
 * The copy is mounted as a kernel would: its journal is replayed, files that were open and deleted go, then nothing may be left to repair.
 */
export const checkExt4 = async (image: string, scratchDir: string, format: 'raw' | 'qcow2' = 'raw'): Promise<Ext4Report> =>
  withCopy(image, scratchDir, format, async (copy) => {
    const { replayed, report } = await replay(copy)
    const check = await runTool('e2fsck', ['-fn', copy], { deadlineMs: 300_000 })
    return { clean: check.exitCode === 0, replayed, report: report + check.stdout + check.stderr }
  })

/** Copies a folder out of an image's ext4 (after a replay of its journal on a copy) to `targetDir`, which has to exist. */
export const extractExt4 = async (image: string, folder: string, targetDir: string, format: 'raw' | 'qcow2' = 'raw'): Promise<void> =>
  withCopy(image, targetDir, format, async (copy) => {
    await replay(copy)
    await tool('debugfs', ['-R', `rdump ${folder} ${targetDir}`, copy], { deadlineMs: 300_000 })
  })

const withCopy = async <T>(image: string, scratchDir: string, format: string, work: (copy: string) => Promise<T>): Promise<T> => {
  const copy = `${scratchDir}/.ext4-${process.pid}-${performance.now().toString(36).replace('.', '')}`
  try {
    await tool('qemu-img', ['convert', '-U', '-f', format, '-O', 'raw', image, copy], { deadlineMs: 300_000 })
    return await work(copy)
  } finally {
    rmSync(copy, { force: true })
  }
}

const replay = async (copy: string): Promise<{ replayed: boolean; report: string }> => {
  const { stdout } = await tool('dumpe2fs', ['-h', copy])
  const replayed = /^Filesystem features:.*\bneeds_recovery\b/m.test(stdout)
  if (!replayed) return { replayed, report: '' }
  const result = await runTool('e2fsck', ['-p', '-E', 'journal_only', copy], { deadlineMs: 300_000 })
  return { replayed, report: result.stdout + result.stderr }
}
