import { createServer, connect } from 'node:net'
import type { Socket } from 'node:net'
import { mkdtemp, rm, stat } from 'node:fs/promises'
import { join } from 'node:path'
import { expect, test } from '@jest/globals'
import { NbdClient, checkHandshake } from '../../core/nbd/index.ts'
import { RecordKind, decodeFramePayload, parseFrame } from '../../core/record/index.ts'
import { FrameQueue, SlabPool } from '../../plugin/buffer/index.ts'
import { AckMeter } from '../../plugin/capture/ack-meter.ts'
import { inlineSealer } from '../../plugin/capture/frame-sealer.ts'
import { Recorder } from '../../plugin/capture/recorder.ts'
import { CaptureTarget } from '../../plugin/capture/target.ts'
import { Random, testSeed } from '../kit/random.ts'

const MiB = 1024 * 1024
const DISK_BYTES = 8 * MiB

type Bench = AsyncDisposable & {
  dir: string
  path: string
  recorder: Recorder
  target: CaptureTarget
  disks: { disk: number; key: string; sizeBytes: number; capturedBytes: number }[]
  closed: { key: string; clean: boolean; why: string }[]
  nextClosed: () => Promise<void>
  stamps: number[]
  hold: boolean
  cuts: number[][]
  /** All records so far, in order. */
  replay: () => { kind: number; disk: number; offsetBytes: number; lengthBytes: number; data: Buffer | undefined }[]
}

const bench = async (): Promise<Bench> => {
  const dir = await mkdtemp('/tmp/cdp-')
  const queue = new FrameQueue()
  const largeSlabs = new SlabPool(MiB, 4 * MiB)
  const recorder = new Recorder({ queue, smallSlabs: new SlabPool(256 * 1024, MiB), largeSlabs, sealer: inlineSealer(() => undefined), nowUnixMs: () => 1, lingerMs: 5 })
  recorder.begin(1, 0, false)
  let onClosed = Promise.withResolvers<void>()
  const disks = ['scsi0', 'scsi1'].map((key, disk) => ({ disk, key, sizeBytes: DISK_BYTES, capturedBytes: 0, lastAtMs: 0 }))
  const self: Omit<Bench, 'target'> = {
    dir, path: join(dir, 's'), recorder, disks, closed: [], stamps: [], hold: false, cuts: [],
    nextClosed: () => onClosed.promise,
    replay: () => {
      recorder.flush()
      const records: ReturnType<Bench['replay']> = []
      queue.rewind(0)
      for (let frame = queue.next(); frame !== undefined; frame = queue.next()) {
        const { header, table, stored } = parseFrame(Buffer.concat([frame.head, frame.payload]))
        const raw = decodeFramePayload(header, stored)
        for (let index = 0; index < table.count; index++) {
          const lengthBytes = table.lengthBytes(index)
          const at = table.payloadOffset(index)
          records.push({ kind: table.kind(index), disk: table.disk(index), offsetBytes: table.offsetBytes(index), lengthBytes, data: table.kind(index) === RecordKind.write ? raw.subarray(at, at + lengthBytes) : undefined })
        }
      }
      return records
    },
    [Symbol.asyncDispose]: async () => {
      await target[Symbol.asyncDispose]()
      recorder.dispose()
      await rm(dir, { recursive: true, force: true })
    },
  }
  const target = new CaptureTarget({
    path: self.path, disks,
    host: {
      recorder, slabs: largeSlabs, meter: new AckMeter(),
      stampBatch: () => void self.stamps.push(recorder.lastSeq),
      holding: () => self.hold,
      cutFromReads: (disk, offsetBytes, lengthBytes) => void self.cuts.push([disk, offsetBytes, lengthBytes]),
    },
    events: {
      opened: () => undefined,
      closed: (key, clean, why) => {
        self.closed.push({ key, clean, why })
        onClosed.resolve()
        onClosed = Promise.withResolvers<void>()
      },
    },
  })
  await target.listen()
  return Object.assign(self, { target })
}

/** Passes bytes on in pieces of random size, one a turn: whatever the kernel might do to a stream. */
const choppingRelay = async (dir: string, targetPath: string, random: Random): Promise<AsyncDisposable & { path: string }> => {
  const path = join(dir, 'relay')
  const sockets = new Set<Socket>()
  const server = createServer((socket) => {
    const onward = connect(targetPath)
    for (const one of [socket, onward]) {
      sockets.add(one)
      one.on('error', () => undefined)
    }
    onward.on('data', (chunk) => socket.write(chunk))
    onward.on('close', () => socket.destroy())
    socket.on('close', () => onward.end())
    void (async () => {
      for await (const chunk of socket as AsyncIterable<Buffer>) {
        for (let at = 0; at < chunk.length; ) {
          const size = random.chance(0.3) ? random.int(1, 40) : random.int(1, 70_000)
          onward.write(chunk.subarray(at, at + size))
          at += size
          if (random.chance(0.5)) await new Promise((resolve) => setImmediate(resolve))
        }
      }
    })().catch(() => undefined)
  })
  await new Promise<void>((resolve) => server.listen(path, resolve))
  return {
    path,
    [Symbol.asyncDispose]: async () => {
      for (const socket of sockets) socket.destroy()
      await new Promise((resolve) => server.close(resolve))
    },
  }
}

const noise = (lengthBytes: number, random: Random): Buffer => {
  const data = Buffer.allocUnsafe(lengthBytes)
  for (let at = 0; at < lengthBytes; at += 4) data.writeUInt32LE(random.u32(), at)
  return data
}

const drive = async (client: NbdClient, model: Buffer, random: Random, steps: number): Promise<number> => {
  let capturedBytes = 0
  const running: Promise<void>[] = []
  // Overlapping requests are QEMU's to serialise: each slice of the disk has its own writer here.
  const lanes = 4
  const laneBytes = DISK_BYTES / lanes
  for (let lane = 0; lane < lanes; lane++) {
    running.push((async () => {
      for (let n = 0; n < steps; n++) {
        const lengthBytes = 512 * (random.chance(0.2) ? random.int(1, 2049) : random.int(1, 33))
        const offsetBytes = lane * laneBytes + 512 * random.int(0, (laneBytes - lengthBytes) / 512 + 1)
        const what = random.int(0, 10)
        if (what < 7) {
          const data = noise(lengthBytes, random)
          data.copy(model, offsetBytes)
          await client.write(offsetBytes, data)
          capturedBytes += lengthBytes
        } else if (what < 8) {
          model.fill(0, offsetBytes, offsetBytes + lengthBytes)
          await client.writeZeroes(offsetBytes, lengthBytes)
          capturedBytes += lengthBytes
        } else if (what < 9) {
          model.fill(0, offsetBytes, offsetBytes + lengthBytes)
          await client.trim(offsetBytes, lengthBytes)
        } else await client.flush()
      }
    })())
  }
  await Promise.all(running)
  return capturedBytes
}

test('writes, zeroes and trims of all sizes on two disks, cut anywhere on their way, become records whose replay is the disks', async () => {
  const seed = testSeed()
  process.stdout.write(`seed ${seed}\n`)
  for (let run = 0; run < 3; run++) {
    const random = new Random(seed + run)
    await using here = await bench()
    await using relay = await choppingRelay(here.dir, here.path, random)
    const models = [Buffer.alloc(DISK_BYTES), Buffer.alloc(DISK_BYTES)]
    const captured = await Promise.all(here.disks.map(async ({ key, disk }) => {
      await using client = await NbdClient.connect({ path: run === 0 ? here.path : relay.path }, { exportName: key })
      return await drive(client, models[disk], random, 12)
    }))
    const replayed = [Buffer.alloc(DISK_BYTES), Buffer.alloc(DISK_BYTES)]
    const records = here.replay()
    for (const { disk, offsetBytes, lengthBytes, data } of records) {
      if (data === undefined) replayed[disk].fill(0, offsetBytes, offsetBytes + lengthBytes)
      else data.copy(replayed[disk], offsetBytes)
    }
    expect(replayed.map((disk, at) => disk.equals(models[at]))).toEqual([true, true])
    expect(here.disks.map(({ capturedBytes }) => capturedBytes)).toEqual(captured)
    expect(records.length).toBe(here.recorder.lastSeq)
    expect(here.cuts).toEqual(records.map(({ disk, offsetBytes, lengthBytes }) => [disk, offsetBytes, lengthBytes]))
    expect(here.stamps).toEqual([...here.stamps].sort((a, b) => a - b))
  }
})

test('a request outside the disk or not made of sectors gets EINVAL and no record; the connection lives on', async () => {
  await using here = await bench()
  const socket = connect(here.path)
  const heard: Buffer[] = []
  const enough = (bytes: number) => new Promise<Buffer>((resolve) => {
    const look = (): void => {
      const all = Buffer.concat(heard)
      if (all.length < bytes) return void socket.once('data', () => setImmediate(look))
      heard.length = 0
      resolve(all)
    }
    look()
  })
  socket.on('data', (chunk) => heard.push(chunk))
  const go = Buffer.alloc(4 + 16 + 4 + 5 + 2)
  go.writeUInt32BE(3, 0)
  go.write('IHAVEOPT', 4)
  go.writeUInt32BE(7, 12)
  go.writeUInt32BE(11, 16)
  go.writeUInt32BE(5, 20)
  go.write('scsi0', 24)
  socket.write(go)
  await enough(18 + 20 + 12)
  await new Promise((resolve) => setImmediate(resolve))
  const request = (type: number, offset: bigint, lengthBytes: number, payload = 0): Buffer => {
    const bytes = Buffer.alloc(28 + payload, 0xab)
    bytes.writeUInt32BE(0x25609513, 0)
    bytes.writeUInt16BE(0, 4)
    bytes.writeUInt16BE(type, 6)
    bytes.writeBigUInt64BE(42n, 8)
    bytes.writeBigUInt64BE(offset, 16)
    bytes.writeUInt32BE(lengthBytes, 24)
    return bytes
  }
  const bad = [request(1, BigInt(DISK_BYTES), 512, 512), request(1, BigInt(DISK_BYTES - 512), 1024, 1024), request(1, 5n, 512, 512), request(1, 0n, 100, 100), request(6, 0n, 0), request(4, BigInt(DISK_BYTES), 512), request(0, 0n, 512),
    request(99, 0n, 512), request(1, BigInt(DISK_BYTES), 1024 * 1024, 1024 * 1024)]
  heard.length = 0
  socket.write(Buffer.concat([...bad, request(1, 0n, 512, 512)]))
  const answers = await enough(16 * (bad.length + 1))
  const tail = answers.subarray(answers.length - 16 * (bad.length + 1))
  expect(Array.from({ length: bad.length + 1 }, (_, at) => tail.readUInt32BE(at * 16 + 4))).toEqual([...bad.map(() => 22), 0])
  expect(here.recorder.lastSeq).toBe(1)
  expect(here.disks[0].capturedBytes).toBe(512)
  // A write longer than the target takes breaks the protocol.
  const gone = here.nextClosed()
  socket.write(request(1, 0n, 1024 * 1024 + 512))
  await gone
  expect(here.closed).toEqual([expect.objectContaining({ key: 'scsi0', clean: false })])
  socket.destroy()
})

test('no acknowledgement before its record; held ones come together when the hold ends', async () => {
  await using here = await bench()
  await using client = await NbdClient.connect({ path: here.path }, { exportName: 'scsi0' })
  await client.write(0, Buffer.alloc(4096, 1))
  expect(here.recorder.lastSeq).toBe(1)
  here.hold = true
  let answered = 0
  const held = [1, 2, 3].map((n) => client.write(n * 4096, Buffer.alloc(4096, n)).then(() => answered++))
  while (here.recorder.lastSeq < 4) await new Promise((resolve) => setImmediate(resolve))
  await checkHandshake({ path: here.path }, 'scsi1', 2000)
  expect([here.recorder.lastSeq, answered]).toEqual([4, 0])
  here.hold = false
  here.target.releaseHeld()
  await Promise.all(held)
  expect(answered).toBe(3)
})

test('a goodbye between two requests is clean; anything else is not, and says why', async () => {
  await using here = await bench()
  let gone = here.nextClosed()
  await checkHandshake({ path: here.path }, 'scsi0', 2000)
  await gone
  const client = await NbdClient.connect({ path: here.path }, { exportName: 'scsi1' })
  gone = here.nextClosed()
  here.target.letGo()
  await gone
  await client.closed
  await client[Symbol.asyncDispose]()
  expect(here.closed).toEqual([{ key: 'scsi0', clean: true, why: expect.any(String) }, { key: 'scsi1', clean: false, why: expect.any(String) }])
  await expect(client.write(0, Buffer.alloc(512))).rejects.toMatchObject({ code: 'CLOSED' })
})

test('unknown exports are refused; dispose ends with connections open, twice is once, and the socket is gone', async () => {
  const here = await bench()
  await expect(NbdClient.connect({ path: here.path }, { exportName: 'scsi9' })).rejects.toMatchObject({ code: 'NBD_REFUSED' })
  const client = await NbdClient.connect({ path: here.path }, { exportName: 'scsi0' })
  await here.target[Symbol.asyncDispose]()
  await here.target[Symbol.asyncDispose]()
  await client[Symbol.asyncDispose]()
  await expect(stat(here.path)).rejects.toMatchObject({ code: 'ENOENT' })
  await here[Symbol.asyncDispose]()
})
