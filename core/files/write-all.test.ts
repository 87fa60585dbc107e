import type { FileHandle } from 'node:fs/promises'
import { expect, test } from '@jest/globals'
import { writeAll } from './index.ts'

const MIB = 1024 * 1024

test('a short write goes on where it ended', async () => {
  const written: { text: string; offset: number }[] = []
  const handle = {
    writev: async (buffers: Buffer[], offset: number) => {
      const text = Buffer.concat(buffers).toString().slice(0, 3)
      written.push({ text, offset })
      return { bytesWritten: text.length, buffers }
    },
  }
  await writeAll(handle as unknown as FileHandle, [Buffer.from('ab'), Buffer.from('cdef'), Buffer.from('gh')], 8, 100)
  expect(written).toEqual([{ text: 'abc', offset: 100 }, { text: 'def', offset: 103 }, { text: 'gh', offset: 106 }])
  await expect(writeAll({ writev: async () => ({ bytesWritten: 0 }) } as unknown as FileHandle, [Buffer.from('a')], 1, 0)).rejects.toMatchObject({ code: 'IO' })
})

test('much is written in calls of bounded size, each going on where the one before ended', async () => {
  const target = Buffer.alloc(9 * MIB)
  const calls: number[] = []
  const handle = {
    writev: async (buffers: Buffer[], offset: number) => {
      const bytes = Buffer.concat(buffers)
      // Every third call is short.
      const bytesWritten = bytes.copy(target, offset, 0, calls.length % 3 === 2 ? 1000 : bytes.length)
      calls.push(bytes.length)
      return { bytesWritten, buffers }
    },
  }
  const sizes = [3 * MIB + 7, 88, 0, MIB, 4 * MIB - 1, 513]
  const buffers = sizes.map((bytes, at) => Buffer.alloc(bytes, at + 1))
  const lengthBytes = sizes.reduce((sum, bytes) => sum + bytes, 0)
  await writeAll(handle as unknown as FileHandle, buffers, lengthBytes, 100)
  expect(target.subarray(100, 100 + lengthBytes).equals(Buffer.concat(buffers))).toBe(true)
  expect(target.subarray(100 + lengthBytes).every((byte) => byte === 0)).toBe(true)
  expect(Math.max(...calls)).toBe(MIB)
})
