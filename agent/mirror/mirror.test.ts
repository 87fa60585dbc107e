import { mkdtemp, readFile, rm, stat, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, test } from '@jest/globals'
import { readBootId } from '../../core/files/index.ts'
import { FrameBuilder, parseFrame, RecordKind } from '../../core/record/index.ts'
import type { Frame } from '../../core/record/index.ts'
import { FileMirror, MirrorSet, MirrorStorage, mirrorFileName } from './index.ts'

const MIB = 1024 * 1024
let directory = ''
beforeEach(async () => {
  directory = await mkdtemp(join(tmpdir(), 'cdp-'))
})
afterEach(() => rm(directory, { recursive: true, force: true }))

const contents = async (disk: { sizeBytes: number; read(offsetBytes: number, target: Buffer): Promise<void> }, offsetBytes = 0, lengthBytes = disk.sizeBytes): Promise<Buffer> => {
  const target = Buffer.alloc(lengthBytes, 0xee)
  await disk.read(offsetBytes, target)
  return target
}

describe('FileMirror', () => {
  test.each(['while it is open', 'after it was opened again'])('what was written and then zeroed reads as zeroes (%s)', async (when) => {
    const path = join(directory, 'disk')
    let disk = await FileMirror.open(path, 8 * MIB)
    const model = Buffer.alloc(8 * MIB)
    await disk.write(MIB - 4096, [Buffer.alloc(8192, 1), Buffer.alloc(4096, 2)], 12_288)
    model.fill(1, MIB - 4096, MIB + 4096).fill(2, MIB + 4096, MIB + 8192)
    await disk.write(5 * MIB, [Buffer.alloc(2 * MIB, 3)], 2 * MIB)
    model.fill(3, 5 * MIB, 7 * MIB)
    if (when !== 'while it is open') {
      await disk.datasync()
      await disk[Symbol.asyncDispose]()
      disk = await FileMirror.open(path, 8 * MIB)
    }
    for (const [offsetBytes, lengthBytes] of [[MIB - 512, 1024], [5 * MIB + 512, MIB + 1024], [0, 512], [7 * MIB - 512, MIB + 512]]) {
      await disk.zero(offsetBytes, lengthBytes)
      model.fill(0, offsetBytes, offsetBytes + lengthBytes)
    }
    expect((await contents(disk)).equals(model)).toBe(true)
    await disk[Symbol.asyncDispose]()
    await disk[Symbol.asyncDispose]()
  })

  test('zeroing what was never written keeps the file sparse and clean, also in a huge disk', async () => {
    await using disk = await FileMirror.open(join(directory, 'disk'), 1024 ** 4)
    await disk.zero(0, 1024 ** 4)
    expect(disk.dirty).toBe(false)
    await disk.write(512 * MIB, [Buffer.alloc(512, 9)], 512)
    expect(disk.dirty).toBe(true)
    await disk.zero(0, 1024 ** 4)
    await disk.datasync()
    expect(disk.dirty).toBe(false)
    expect((await contents(disk, 512 * MIB, 512)).equals(Buffer.alloc(512))).toBe(true)
    expect((await stat(disk.path)).blocks * 512).toBeLessThan(4 * MIB)
  })

  test('what reads as zeroes already is made durable all the same: an agent that was killed may have written it', async () => {
    const path = join(directory, 'disk')
    {
      await using killed = await FileMirror.open(path, MIB)
      await killed.write(0, [Buffer.alloc(MIB, 1)], MIB)
      await killed.datasync()
      await killed.zero(0, MIB)
    }
    await using disk = await FileMirror.open(path, MIB)
    await disk.zero(0, MIB)
    expect(disk.dirty).toBe(true)
  })

  test('an fdatasync failed in this boot: zeroes are written also where it reads as zeroes; in another boot: they are not, and the mark goes', async () => {
    const [path, mark] = [join(directory, 'disk'), join(directory, 'disk.doubt')]
    const blocksAfterZeroing = async (): Promise<number> => {
      await using disk = await FileMirror.open(path, MIB)
      await disk.zero(0, MIB)
      await disk.datasync()
      return (await stat(path)).blocks
    }
    await writeFile(mark, 'another boot')
    expect(await blocksAfterZeroing()).toBe(0)
    await expect(stat(mark)).rejects.toMatchObject({ code: 'ENOENT' })
    await writeFile(mark, (await readBootId()) ?? 'unknown')
    expect((await blocksAfterZeroing()) * 512).toBe(MIB)
    expect(await readFile(mark, 'utf8')).toBe(await readBootId())
  })

  test('reading behind the end gives zeroes, writing there is refused until the disk has grown', async () => {
    await using disk = await FileMirror.open(join(directory, 'disk'), 4096)
    await disk.write(0, [Buffer.alloc(4096, 5)], 4096)
    const read = await contents(disk, 2048, 4096)
    expect(read.subarray(0, 2048).equals(Buffer.alloc(2048, 5)) && read.subarray(2048).equals(Buffer.alloc(2048))).toBe(true)
    await expect(disk.write(2048, [Buffer.alloc(4096)], 4096)).rejects.toMatchObject({ code: 'BAD_INPUT' })
    await expect(disk.zero(4096, 512)).rejects.toMatchObject({ code: 'BAD_INPUT' })
    await disk.grow(100 * MIB)
    await disk.write(99 * MIB, [Buffer.alloc(512, 6)], 512)
    await disk.zero(99 * MIB, 512)
    expect((await contents(disk, 99 * MIB, 512)).equals(Buffer.alloc(512))).toBe(true)
    await disk.grow(4096)
    expect(disk.sizeBytes).toBe(100 * MIB)
  })
})

const frameOf = (fill: (builder: FrameBuilder) => void): Frame => {
  const builder = new FrameBuilder(Buffer.alloc(MIB))
  fill(builder)
  const { head, payload } = builder.seal({ firstSeq: 1, epoch: 1, atUnixMs: 0, flags: 1 })
  return parseFrame(Buffer.concat([head, payload]))
}
const addWrite = (builder: FrameBuilder, disk: number, offsetBytes: number, lengthBytes: number, fill: number): void => {
  const at = builder.reserveData(RecordKind.write, disk, offsetBytes, lengthBytes)
  builder.payload.fill(fill, at, at + lengthBytes)
}

test('a frame is applied in order, over several disks, and may be applied twice', async () => {
  await using mirrors = await MirrorSet.open(new MirrorStorage({ vmDirectory: directory }), [{ disk: 0, key: 'a', sizeBytes: 65_536 }, { disk: 3, key: 'b', sizeBytes: 65_536 }])
  const frame = frameOf((builder) => {
    addWrite(builder, 0, 0, 4096, 1)
    addWrite(builder, 0, 4096, 4096, 2)
    addWrite(builder, 3, 8192, 4096, 3)
    addWrite(builder, 0, 2048, 4096, 4)
    builder.addRange(RecordKind.discard, 0, 0, 1024)
    builder.addRange(RecordKind.resize, 3, 131_072, 0)
    addWrite(builder, 3, 126_976, 4096, 5)
  })
  const expected = Buffer.alloc(65_536)
  expected.fill(1, 1024, 2048).fill(4, 2048, 6144).fill(2, 6144, 8192)
  for (let applied = 0; applied < 2; applied++) {
    await mirrors.apply(frame)
    await mirrors.datasync()
    expect((await contents(mirrors.disk(0))).equals(expected)).toBe(true)
    expect((await contents(mirrors.disk(3), 126_976, 4096)).equals(Buffer.alloc(4096, 5))).toBe(true)
  }
  expect((await stat(join(directory, 'mirror', mirrorFileName(3)))).size).toBe(131_072)
  expect(() => mirrors.disk(1)).toThrow(expect.objectContaining({ code: 'NOT_FOUND' }))
})
