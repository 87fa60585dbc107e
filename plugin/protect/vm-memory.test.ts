import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { afterEach, beforeEach, expect, test } from '@jest/globals'
import { VmMemoryFile } from './vm-memory.ts'

let directory = ''
beforeEach(async () => {
  directory = await mkdtemp('/tmp/cdp-m-')
})
afterEach(() => rm(directory, { recursive: true, force: true }))

test('progress belongs to the copy that is under way, of that QEMU process, and to nothing else', async () => {
  const memory = new VmMemoryFile(directory, 101, 'a1')
  await memory.noteProgress('1@1', { 0: 10 })
  expect(await memory.read('1@1')).toBeUndefined()
  await memory.write('1@1', 'copying')
  await memory.noteProgress('2@2', { 0: 10 })
  expect(await memory.read('1@1')).toEqual({ format: 1, instance: '1@1', bitmaps: 'copying', agent: { id: 'a1', durableSeq: 0 } })
  await memory.noteProgress('1@1', { 0: 10 })
  expect(await memory.read('1@1')).toEqual({ format: 1, instance: '1@1', bitmaps: 'copying', progress: { 0: 10 }, agent: { id: 'a1', durableSeq: 0 } })
  // A new copy begins at nothing; one that has ended needs none.
  await memory.write('1@1', 'copying')
  expect(await memory.read('1@1')).not.toHaveProperty('progress')
  await memory.write('1@1', 'covered')
  await memory.noteProgress('1@1', { 0: 20 })
  expect(await memory.read('1@1')).toEqual({ format: 1, instance: '1@1', bitmaps: 'covered', agent: { id: 'a1', durableSeq: 0 } })
})

test('the state that was written last is what stays, whatever is still being written', async () => {
  const memory = new VmMemoryFile(directory, 101, 'a1')
  await memory.write('1@1', 'copying')
  const writes = [memory.noteProgress('1@1', { 0: 10 }), memory.write('1@1', 'covered')]
  await Promise.all(writes)
  expect(JSON.parse(await readFile(join(directory, 'vm-101.json'), 'utf8'))).toEqual({ format: 1, instance: '1@1', bitmaps: 'covered', agent: { id: 'a1', durableSeq: 0 } })
  // Whoever comes second builds on what the first one meant.
  await memory.write('1@1', 'copying')
  await Promise.all([memory.write('1@1', 'covered'), memory.noteProgress('1@1', { 0: 10 }), memory.noteDurable('1@1', 5)])
  expect(JSON.parse(await readFile(join(directory, 'vm-101.json'), 'utf8'))).toEqual({ format: 1, instance: '1@1', bitmaps: 'covered', agent: { id: 'a1', durableSeq: 5 } })
  await memory.forget()
  expect(await memory.read('1@1')).toBeUndefined()
})

test('after a restart progress goes on from the file: disk by disk', async () => {
  await writeFile(join(directory, 'vm-101.json'), JSON.stringify({ format: 1, instance: '1@1', bitmaps: 'copying', progress: { 0: 10 }, agent: { id: 'a1', durableSeq: 0 } }))
  const memory = new VmMemoryFile(directory, 101, 'a1')
  await memory.noteProgress('1@1', { 1: 7 })
  expect(await memory.read('1@1')).toMatchObject({ progress: { 0: 10, 1: 7 } })
})

test('what is remembered speaks of one recovery site: of another one, or one that lost something, bitmaps prove nothing, whatever becomes of the attach that finds out', async () => {
  const memory = new VmMemoryFile(directory, 101, 'a1')
  await memory.write('1@1', 'covered', { scsi0: 512 }, 100)
  await memory.noteDurable('1@1', 200)
  await memory.noteDurable('1@1', 150)
  await memory.noteDurable('2@2', 900)
  expect(await memory.read('1@1')).toEqual({ format: 1, instance: '1@1', bitmaps: 'covered', disks: { scsi0: 512 }, agent: { id: 'a1', durableSeq: 200 } })
  expect(await new VmMemoryFile(directory, 101, 'b2').read('1@1')).toEqual({ format: 1, instance: '1@1', bitmaps: 'attaching' })
  expect(await new VmMemoryFile(directory, 101, 'b2').losesTo('1@1', 1)).toBe(false)

  // Another plugin, and another QEMU: the recovery site is the same.
  const later = new VmMemoryFile(directory, 101, 'a1')
  expect(await later.losesTo('2@2', 200)).toBe(false)
  expect(await later.losesTo('1@1', 199)).toBe(true)
  expect(await new VmMemoryFile(directory, 101, 'a1').read('1@1')).toEqual({ format: 1, instance: '1@1', bitmaps: 'attaching', agent: { id: 'a1', durableSeq: 199 } })
  // Once it was copied again, it counts from what it holds.
  await later.write('1@1', 'copying')
  await later.noteProgress('1@1', { 0: 512 }, 250)
  expect(await later.losesTo('1@1', 249)).toBe(true)
})

test('what another node said of bitmaps that came with the VM is claimed of that recovery site, with what it held, and of no other one', async () => {
  const memory = new VmMemoryFile(directory, 101, 'a1')
  const carried = { coveredBytes: { scsi0: 512 }, agent: { id: 'a1', durableSeq: 70 } }
  await memory.takeOver('3@3', carried)
  expect(await memory.read('3@3')).toEqual({ format: 1, instance: '3@3', bitmaps: 'covered', disks: { scsi0: 512 }, agent: { id: 'a1', durableSeq: 70 } })
  expect(await memory.losesTo('3@3', 69)).toBe(true)
  for (const doubtful of [{ ...carried, agent: { id: 'b2', durableSeq: 70 } }, { ...carried, coveredBytes: {} }]) {
    await memory.takeOver('4@4', doubtful)
    expect(await memory.read('4@4')).toMatchObject({ instance: '4@4', bitmaps: 'attaching' })
  }
})
