import { execFile } from 'node:child_process'
import { closeSync, openSync, writeFileSync, writeSync } from 'node:fs'
import { mkdtemp, readFile, rm } from 'node:fs/promises'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { afterAll, beforeAll, expect, test } from '@jest/globals'
import { mergeVm } from '../../agent/index/index.ts'
import { PinRegistry, PointServer } from '../../agent/recovery/index.ts'
import type { OpenedPoint } from '../../agent/recovery/index.ts'
import { NbdClient } from '../../core/nbd/index.ts'
import { adaptiveZstd } from '../../core/record/index.ts'
import { Random, testSeed } from '../kit/random.ts'
import { RandomHistory } from '../kit/random-history.ts'

const run = promisify(execFile)
const DISK_BYTES = 8 * 1024 * 1024

let directory: string
let history: RandomHistory
let server: PointServer
const pins = new PinRegistry()
const vmDirectory = (): string => join(directory, 'vm')

beforeAll(async () => {
  const seed = testSeed()
  console.log(`seed ${seed}`)
  directory = await mkdtemp('/tmp/cdp-serve-')
  history = new RandomHistory(vmDirectory(), new Random(seed), { compress: adaptiveZstd(), diskBytes: DISK_BYTES })
  history.grow(1500)
  history.writer.sealAll()
  await mergeVm(vmDirectory(), 4)
  server = await PointServer.listen({ socketPath: join(directory, 'p.sock'), pins })
})

afterAll(async () => {
  await server[Symbol.asyncDispose]()
  history[Symbol.dispose]()
  await rm(directory, { recursive: true, force: true })
})

const openPoint = (pointId: string, seq: number): Promise<OpenedPoint> => server.openPoint({ pointId, vms: [{ vm: 'vm-1', vmDirectory: vmDirectory(), seq }] })

const modelFile = (name: string, seq: number, disk: number): string => {
  const path = join(directory, name)
  writeFileSync(path, history.modelAt(seq, disk))
  return path
}

test('qemu-img, nbdcopy, nbdinfo and qemu-io read two points at once, each exactly as of its sequence', async () => {
  const { lastSeq } = history.writer
  const points = await Promise.all([openPoint('early', Math.floor(lastSeq / 3)), openPoint('late', lastSeq)])
  expect(server.list().map(({ pointId }) => pointId).sort()).toEqual(['early', 'late'])
  expect(pins.lowest(vmDirectory())).toBe(Math.floor(lastSeq / 3))
  for (const point of points) {
    for (const { uri, disk, seq, sizeBytes, exportName } of point.disks) {
      const model = modelFile(`model-${point.pointId}-${disk}.raw`, seq, disk)
      const { stdout: compared } = await run('qemu-img', ['compare', '-f', 'raw', '-F', 'raw', model, uri])
      expect(compared).toContain('identical')
      const converted = join(directory, 'converted.qcow2')
      await run('qemu-img', ['convert', '-f', 'raw', '-O', 'qcow2', uri, converted])
      await run('qemu-img', ['compare', '-f', 'raw', '-F', 'qcow2', model, converted])
      const copied = join(directory, 'copied.raw')
      await run('nbdcopy', [uri, copied])
      expect((await readFile(copied)).equals(history.modelAt(seq, disk))).toBe(true)
      const { stdout: size } = await run('nbdinfo', ['--size', uri])
      expect(Number(size)).toBe(sizeBytes)
      const { stdout: io } = await run('qemu-io', ['-r', '-f', 'raw', '-c', 'read 1536 70000', uri])
      expect(io).toContain('read 70000/70000 bytes')
      expect(exportName).toBe(`${point.pointId}/vm-1/scsi${disk}`)
    }
  }
  const { stdout: listed } = await run('nbdinfo', ['--list', '--json', `nbd+unix:///?socket=${join(directory, 'p.sock')}`])
  expect((JSON.parse(listed) as { exports: unknown[] }).exports.length).toBe(points.flatMap(({ disks }) => disks).length)
  for (const { pointId } of points) expect(await server.closePoint(pointId)).toBe(true)
  expect(pins.list()).toEqual([])
  await expect(run('nbdinfo', [points[0].disks[0].uri])).rejects.toThrow()
})

test('nbdinfo --map shows holes where they are known, and nothing written is called a hole', async () => {
  const { lastSeq } = history.writer
  const point = await openPoint('mapped', lastSeq)
  const { uri, disk, sizeBytes } = point.disks[0]
  const { stdout } = await run('nbdinfo', ['--map', '--json', uri])
  const extents = JSON.parse(stdout) as { offset: number; length: number; type: number }[]
  const model = history.modelAt(lastSeq, disk)
  expect(extents.reduce((sum, { length }) => sum + length, 0)).toBe(sizeBytes)
  expect(extents.some(({ type }) => type === 3)).toBe(true)
  for (const { offset, length, type } of extents) if (type === 3) expect(model.subarray(offset, offset + length).every((byte) => byte === 0)).toBe(true)
  await server.closePoint('mapped')
})

test('a point with clients is closed only by force, and a write is refused', async () => {
  const point = await openPoint('busy', history.writer.lastSeq)
  const { uri, exportName } = point.disks[0]
  await expect(run('qemu-io', ['-f', 'raw', '-c', 'write 0 512', uri])).rejects.toThrow()
  await using client = await NbdClient.connect({ path: join(directory, 'p.sock') }, { exportName, deadlineMs: 10_000 })
  await client.read(0, 4096)
  await expect(server.closePoint('busy')).rejects.toMatchObject({ code: 'CONFLICT' })
  await expect(openPoint('busy', 1)).rejects.toMatchObject({ code: 'CONFLICT' })
  expect(await server.closePoint('busy', { force: true })).toBe(true)
  await expect(client.read(0, 4096)).rejects.toThrow()
  expect(await server.closePoint('busy')).toBe(false)
})

test('a point that cannot be opened leaves nothing behind', async () => {
  await expect(openPoint('beyond', history.writer.lastSeq + 1)).rejects.toMatchObject({ code: 'NOT_FOUND' })
  await expect(server.openPoint({ pointId: 'other', vms: [{ vm: 'vm-2', vmDirectory: vmDirectory(), seq: 1 }] })).rejects.toMatchObject({ code: 'BAD_INPUT' })
  await expect(server.openPoint({ pointId: 'a/b', vms: [] })).rejects.toMatchObject({ code: 'BAD_INPUT' })
  expect(server.list()).toEqual([])
  expect(pins.list()).toEqual([])
})

test('a guest disk on a qcow2 overlay over a point is written without touching the point', async () => {
  const { lastSeq } = history.writer
  const point = await openPoint('backing', lastSeq)
  const { uri, disk } = point.disks[0]
  const overlay = join(directory, 'overlay.qcow2')
  await run('qemu-img', ['create', '-q', '-f', 'qcow2', '-F', 'raw', '-b', uri, overlay])
  await run('qemu-io', ['-f', 'qcow2', '-c', 'write -P 0x5a 65536 8192', overlay])
  const changed = history.modelAt(lastSeq, disk).fill(0x5a, 65_536, 65_536 + 8192)
  const path = join(directory, 'changed.raw')
  const fd = openSync(path, 'w')
  writeSync(fd, changed)
  closeSync(fd)
  const { stdout } = await run('qemu-img', ['compare', '-f', 'raw', '-F', 'qcow2', path, overlay])
  expect(stdout).toContain('identical')
  await run('qemu-img', ['compare', '-f', 'raw', '-F', 'raw', modelFile('unchanged.raw', lastSeq, disk), uri])
  await server.closePoint('backing')
})
