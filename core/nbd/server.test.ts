import { mkdtemp, readdir, rename, rm, stat } from 'node:fs/promises'
import { createConnection, createServer, type Socket } from 'node:net'
import { once } from 'node:events'
import { afterEach, beforeEach, describe, expect, test } from '@jest/globals'
import { CdpError } from '../errors/index.ts'
import { NbdClient, type NbdClientOptions } from './client.ts'
import * as nbd from './constants.ts'
import type { NbdExport } from './export.ts'
import { MemoryExport } from './memory-export.ts'
import { encodeOption, encodeString } from './option-codec.ts'
import { seededIntegers } from './seeded.ts'
import { NbdServer, type NbdServerOptions } from './server.ts'

const MIB = 1024 * 1024
let root = ''
let path = ''
const open: AsyncDisposable[] = []

beforeEach(async () => {
  root = await mkdtemp('/tmp/cdp-')
  path = `${root}/s`
})
afterEach(async () => {
  for (const one of open.splice(0).reverse()) await one[Symbol.asyncDispose]()
  await rm(root, { recursive: true })
})

const serve = async (exports: readonly NbdExport[], options: Partial<NbdServerOptions> = {}): Promise<NbdServer> => {
  const findExport = (name: string): NbdExport | undefined => exports.find((one) => one.name === name)
  const server = await NbdServer.listen({ address: { path }, findExport, listExports: () => exports, ...options })
  open.push(server)
  return server
}
const join = async (options: Partial<NbdClientOptions> = {}): Promise<NbdClient> => {
  const client = await NbdClient.connect({ path }, { exportName: 'disk', ...options })
  open.push(client)
  return client
}
const refusedWith = (errno: string): unknown => expect.objectContaining({ code: 'NBD_REFUSED', context: expect.objectContaining({ errno }) })
const coded = (code: string): unknown => expect.objectContaining({ code })

/** Resolves when `condition` holds; looks once per turn of the event loop. */
const until = async (condition: () => boolean): Promise<void> => {
  while (!condition()) await new Promise((resolve) => setImmediate(resolve))
}

const header = (type: number, offsetBytes: number, lengthBytes: number, flags = 0, cookie = 0): Buffer => {
  const out = Buffer.alloc(28)
  out.writeUInt32BE(nbd.NBD_REQUEST_MAGIC, 0)
  out.writeUInt16BE(flags, 4)
  out.writeUInt16BE(type, 6)
  out.writeUInt32BE(cookie, 12)
  out.writeUInt32BE(offsetBytes, 20)
  out.writeUInt32BE(lengthBytes, 24)
  return out
}

/** A socket that has entered transmission on `disk` with simple replies. */
const rawSession = async (): Promise<Socket> => {
  const socket = createConnection({ path })
  socket.on('error', () => undefined)
  open.push({ [Symbol.asyncDispose]: async () => void socket.destroy() })
  socket.write(Buffer.concat([Buffer.from([0, 0, 0, 3]), encodeOption(nbd.NBD_OPT_EXPORT_NAME, [encodeString('disk').subarray(4)])]))
  let gotBytes = 0
  while (gotBytes < 28) gotBytes += ((await once(socket, 'data')) as [Buffer])[0].length
  expect(gotBytes).toBe(28)
  return socket
}

describe.each([true, false])('client and server, structured replies %s', (structuredReplies) => {
  test('write, zero, trim, flush and read back in pieces', async () => {
    const disk = new MemoryExport({ name: 'disk', sizeBytes: 40 * MIB })
    await serve([disk], { structuredReplies })
    const client = await join({ metaContexts: [nbd.BASE_ALLOCATION] })
    const metaContexts = structuredReplies ? [nbd.BASE_ALLOCATION] : []
    expect(client).toMatchObject({ structuredReplies, sizeBytes: 40 * MIB, readOnly: false, canMultiConn: true, metaContexts })
    const data = Buffer.from(Array.from({ length: 70_000 }, (_, index) => (index * 7) & 255))
    await client.write(5, data, { fua: true })
    await client.writeZeroes(1000, 500)
    await client.writeZeroes(2000, 100, { mayTrim: false, fua: true, fast: true })
    await client.trim(3000, 100)
    await client.flush()
    data.fill(0, 995, 1495).fill(0, 1995, 2095).fill(0, 2995, 3095)
    expect((await client.read(5, data.length)).equals(data)).toBe(true)
    expect(disk.flushCount).toBe(1)
    // 40 MiB are two requests: the server takes at most 32.
    const whole = Buffer.alloc(40 * MIB + 10, 0xee)
    await client.readInto(whole, 10, 0, 40 * MIB)
    expect(whole.subarray(10).equals(disk.bytes)).toBe(true)
    await client.write(0, Buffer.alloc(40 * MIB, 0x11))
    expect(disk.bytes.equals(Buffer.alloc(40 * MIB, 0x11))).toBe(true)
    expect(await client.read(0, 0)).toHaveLength(0)
  })

  test('errors of the export reach the client as NBD errors, and the connection stays', async () => {
    const disk = new MemoryExport({ name: 'disk', sizeBytes: MIB })
    const errors: readonly unknown[] = [
      new Error('broken'), Object.assign(new Error('full'), { code: 'ENOSPC' }), new CdpError('BAD_INPUT', 'no'),
      Object.assign(new Error('r/o'), { code: 'EROFS' }),
    ]
    disk.read = async (offsetBytes) => {
      throw errors[offsetBytes]
    }
    disk.write = async (offsetBytes) => {
      throw errors[offsetBytes]
    }
    const server = await serve([disk], { structuredReplies })
    const client = await join()
    for (const [offsetBytes, errno] of ['EIO', 'ENOSPC', 'EINVAL', 'EPERM'].entries()) {
      await expect(client.read(offsetBytes, 10)).rejects.toEqual(refusedWith(errno))
      await expect(client.write(offsetBytes, Buffer.alloc(10))).rejects.toEqual(refusedWith(errno))
    }
    await client.flush()
    expect(server.counters).toMatchObject({ requests: 9, errorReplies: 8, openConnections: 1, protocolErrors: 0 })
  })

  test('a random history leaves the same bytes as in a model', async () => {
    const seed = Date.now() >>> 0
    console.log(`seed ${seed}`)
    const below = seededIntegers(seed)
    const disk = new MemoryExport({ name: 'disk', sizeBytes: MIB, sparseReads: true })
    const model = Buffer.alloc(MIB)
    await serve([disk], { structuredReplies })
    const client = await join({ metaContexts: [nbd.BASE_ALLOCATION] })
    for (let step = 0; step < 400; step++) {
      const offsetBytes = below(MIB)
      const lengthBytes = below(Math.min(below(2) === 0 ? 5000 : 300_000, MIB - offsetBytes + 1))
      const endBytes = offsetBytes + lengthBytes
      switch (below(5)) {
        case 0:
          model.fill(below(256), offsetBytes, endBytes)
          await client.write(offsetBytes, Buffer.from(model.subarray(offsetBytes, endBytes)), { fua: below(2) === 0 })
          break
        case 1:
          model.fill(0, offsetBytes, endBytes)
          await client.writeZeroes(offsetBytes, lengthBytes)
          break
        case 2:
          model.fill(0, offsetBytes, endBytes)
          await client.trim(offsetBytes, lengthBytes)
          break
        default: {
          const target = Buffer.alloc(lengthBytes, 0xee)
          for (const hole of await client.readInto(target, 0, offsetBytes, lengthBytes)) {
            expect(model.subarray(hole.offsetBytes, hole.offsetBytes + hole.lengthBytes).every((byte) => byte === 0)).toBe(true)
          }
          expect(target.equals(model.subarray(offsetBytes, endBytes))).toBe(true)
        }
      }
    }
    expect(disk.bytes.equals(model)).toBe(true)
  })

  test('an export that reads too little is an I/O error, not a broken stream', async () => {
    const disk = new MemoryExport({ name: 'disk', sizeBytes: MIB })
    disk.read = async () => [Buffer.alloc(3)]
    await serve([disk], { structuredReplies })
    const client = await join()
    await expect(client.read(0, 4)).rejects.toEqual(refusedWith('EIO'))
    expect(await client.read(0, 3)).toHaveLength(3)
  })

  test('replies come in the order in which the export is ready', async () => {
    const disk = new MemoryExport({ name: 'disk', sizeBytes: MIB })
    disk.bytes.fill(9)
    const gate = Promise.withResolvers<void>()
    disk.read = async (offsetBytes, lengthBytes) => {
      if (offsetBytes === 0) await gate.promise
      return [disk.bytes.subarray(offsetBytes, offsetBytes + lengthBytes)]
    }
    await serve([disk], { structuredReplies })
    const client = await join()
    const slow = client.read(0, 100)
    await client.read(100, 100)
    gate.resolve()
    expect((await slow).equals(Buffer.alloc(100, 9))).toBe(true)
  })
})

describe('NbdServer', () => {
  test('refuses what is out of bounds, not aligned, too long, not offered or unknown, and goes on', async () => {
    const disk = new MemoryExport({ name: 'disk', sizeBytes: MIB, minBytes: 512 })
    const server = await serve([disk])
    const socket = await rawSession()
    const cases: [Buffer, number][] = [
      [header(nbd.NBD_CMD_READ, MIB, 512), nbd.NBD_EINVAL], [header(nbd.NBD_CMD_WRITE, MIB - 512, 1024), nbd.NBD_ENOSPC],
      [header(nbd.NBD_CMD_WRITE_ZEROES, MIB, 512), nbd.NBD_ENOSPC], [header(nbd.NBD_CMD_TRIM, MIB, 512), nbd.NBD_EINVAL],
      [header(nbd.NBD_CMD_READ, 1, 512), nbd.NBD_EINVAL], [header(nbd.NBD_CMD_READ, 0, 511), nbd.NBD_EINVAL],
      [header(nbd.NBD_CMD_READ, 0, 0xffff_fe00), nbd.NBD_EINVAL], [header(nbd.NBD_CMD_CACHE, 0, 512), nbd.NBD_EINVAL], [header(99, 0, 512), nbd.NBD_EINVAL],
      [header(nbd.NBD_CMD_READ, 0, 512, nbd.NBD_CMD_FLAG_DF), nbd.NBD_EINVAL], [header(nbd.NBD_CMD_READ, 0, 512, 1 << 9), nbd.NBD_EINVAL],
      [header(nbd.NBD_CMD_BLOCK_STATUS, 0, 512), nbd.NBD_EINVAL], [header(nbd.NBD_CMD_FLUSH, 0, 512), nbd.NBD_EINVAL],
      [header(nbd.NBD_CMD_WRITE, 512, 512), 0], [header(nbd.NBD_CMD_FLUSH, 0, 0), 0], [header(nbd.NBD_CMD_TRIM, 0, 0), 0],
    ]
    for (const [request, errno] of cases) {
      const payloadBytes = request.readUInt16BE(6) === nbd.NBD_CMD_WRITE ? request.readUInt32BE(24) : 0
      socket.write(Buffer.concat([request, Buffer.alloc(payloadBytes, 0x33)]))
      const [reply] = (await once(socket, 'data')) as [Buffer]
      expect(reply).toHaveLength(16)
      expect(reply.readUInt32BE(4)).toBe(errno)
    }
    expect(disk.bytes.indexOf(0x33)).toBe(512)
    expect(disk.bytes.lastIndexOf(0x33)).toBe(1023)
    expect(server.counters).toMatchObject({ openConnections: 1, errorReplies: 13, protocolErrors: 0, writtenBytes: 512 })
  })

  test('requests in the same packet as the end of the handshake are served', async () => {
    await serve([new MemoryExport({ name: 'disk', sizeBytes: MIB })])
    const socket = createConnection({ path })
    socket.write(Buffer.concat([
      Buffer.from([0, 0, 0, 3]), encodeOption(nbd.NBD_OPT_EXPORT_NAME, [encodeString('disk').subarray(4)]),
      header(nbd.NBD_CMD_READ, 0, 512), header(nbd.NBD_CMD_DISC, 0, 0),
    ]))
    let gotBytes = 0
    socket.on('data', (chunk: Buffer) => (gotBytes += chunk.length))
    await once(socket, 'close')
    expect(gotBytes).toBe(18 + 10 + 16 + 512)
  })

  test('an export whose opened or closed throws loses that connection only, and it is reported', async () => {
    const errors: CdpError[] = []
    const disk = new MemoryExport({ name: 'disk', sizeBytes: MIB })
    const server = await serve([disk], { onConnectionError: (error) => errors.push(error) })
    const calls = { opened: 0 }
    disk.opened = () => {
      if (++calls.opened === 1) throw new RangeError('no room')
    }
    disk.closed = () => {
      throw new RangeError('lost count')
    }
    const first = await join()
    await first.closed
    const second = await join()
    expect(await second.read(0, 512)).toHaveLength(512)
    await second[Symbol.asyncDispose]()
    await until(() => server.counters.openConnections === 0)
    expect(errors.map((error) => error.message)).toEqual(['no room', 'lost count'])
  })

  test('a socket path that is too long is refused with a hint', async () => {
    await expect(serve([], { address: { path: `${root}/${'x'.repeat(100)}` } })).rejects.toMatchObject({ code: 'BAD_INPUT', hint: expect.any(String) })
  })

  test('a read-only export refuses every write and keeps no payload', async () => {
    const disk = new MemoryExport({ name: 'disk', sizeBytes: MIB, readOnly: true })
    await serve([disk])
    const client = await join()
    expect(client.readOnly).toBe(true)
    await expect(client.write(0, Buffer.alloc(512))).rejects.toEqual(coded('NBD_REFUSED'))
    const socket = await rawSession()
    const write = Buffer.concat([header(nbd.NBD_CMD_WRITE, 0, 512), Buffer.alloc(512, 1)])
    for (const request of [write, header(nbd.NBD_CMD_WRITE_ZEROES, 0, 512), header(nbd.NBD_CMD_TRIM, 0, 512)]) {
      socket.write(request)
      expect(((await once(socket, 'data')) as [Buffer])[0].readUInt32BE(4)).toBe(nbd.NBD_EPERM)
    }
    expect(disk.bytes.every((byte) => byte === 0)).toBe(true)
  })

  test('never has more requests or bytes under way than its limits, whatever a client sends at once', async () => {
    const disk = new MemoryExport({ name: 'disk', sizeBytes: MIB })
    let [running, most] = [0, 0]
    disk.read = async (_offsetBytes, lengthBytes) => {
      running += 1
      most = Math.max(most, running)
      await new Promise((resolve) => setImmediate(resolve))
      running -= 1
      return [Buffer.alloc(lengthBytes)]
    }
    const server = await serve([disk], { limits: { maxRequestsInFlight: 8, maxBytesInFlight: 3 * 4096 } })
    const small = await rawSession()
    const expectReplies = async (count: number, lengthBytes: number): Promise<void> => {
      small.write(Buffer.concat(Array.from({ length: count }, (_, index) => header(nbd.NBD_CMD_READ, 0, lengthBytes, 0, index))))
      let leftBytes = count * (16 + lengthBytes)
      while (leftBytes > 0) leftBytes -= ((await once(small, 'data')) as [Buffer])[0].length
      expect(leftBytes).toBe(0)
    }
    await expectReplies(1000, 16)
    expect(most).toBe(8)
    most = 0
    await expectReplies(100, 4096)
    expect(most).toBe(3)
    await expectReplies(3, 65_536) // each alone above the limit: one at a time
    expect(server.counters.requests).toBe(1103)
  })

  test('a client that reads no replies is not read from either, and others are served', async () => {
    const disk = new MemoryExport({ name: 'disk', sizeBytes: MIB })
    const server = await serve([disk], { limits: { maxRequestsInFlight: 4 } })
    const greedy = await rawSession()
    greedy.pause()
    const many = Buffer.concat(Array.from({ length: 20_000 }, () => header(nbd.NBD_CMD_READ, 0, MIB)))
    greedy.write(many)
    await until(() => server.counters.requests >= 4)
    const client = await join()
    for (let i = 0; i < 20; i++) await client.read(0, MIB)
    expect(server.counters.requests).toBeLessThan(20 + 16)
    greedy.destroy()
    await until(() => server.counters.openConnections === 1)
  })

  test('sparse reads send zeroes as holes, and the client says which', async () => {
    const disk = new MemoryExport({ name: 'disk', sizeBytes: MIB, readOnly: true, sparseReads: true })
    disk.bytes.fill(1, 4096, 8192).fill(2, 65_536, 65_537)
    await serve([disk])
    const client = await join()
    const target = Buffer.alloc(MIB, 0xee)
    const holes = await client.readInto(target, 0, 0, MIB)
    expect(holes).toEqual([
      { offsetBytes: 0, lengthBytes: 4096 }, { offsetBytes: 8192, lengthBytes: 57_344 }, { offsetBytes: 69_632, lengthBytes: MIB - 69_632 },
    ])
    expect(target.equals(disk.bytes)).toBe(true)
    expect((await client.read(4000, 200)).equals(disk.bytes.subarray(4000, 4200))).toBe(true)
  })

  test('opened and closed are called once a client, closed after its last operation, whose signal was aborted', async () => {
    const disk = new MemoryExport({ name: 'disk', sizeBytes: MIB })
    const gate = Promise.withResolvers<void>()
    let signal: AbortSignal | undefined
    disk.read = async (_offsetBytes, lengthBytes, given?: AbortSignal) => {
      signal = given
      await gate.promise
      return [Buffer.alloc(lengthBytes)]
    }
    const server = await serve([disk])
    const socket = await rawSession()
    expect(disk.openCount).toBe(1)
    socket.write(header(nbd.NBD_CMD_READ, 0, 512))
    await until(() => signal !== undefined)
    socket.destroy()
    await until(() => signal?.aborted === true)
    expect(disk.openCount).toBe(1)
    gate.resolve()
    await until(() => disk.openCount === 0 && server.counters.openConnections === 0)
  })

  test('NBD_CMD_DISC is obeyed after the requests before it are answered', async () => {
    const disk = new MemoryExport({ name: 'disk', sizeBytes: MIB })
    await serve([disk])
    const socket = await rawSession()
    socket.write(Buffer.concat([header(nbd.NBD_CMD_READ, 0, 512), header(nbd.NBD_CMD_DISC, 0, 0), header(nbd.NBD_CMD_READ, 0, 512)]))
    let gotBytes = 0
    socket.on('data', (chunk: Buffer) => (gotBytes += chunk.length))
    await once(socket, 'close')
    expect(gotBytes).toBe(16 + 512)
  })

  test('a client that dawdles in the handshake is closed at the deadline', async () => {
    const errors: CdpError[] = []
    await serve([], { limits: { handshakeDeadlineMs: 30 }, onConnectionError: (error) => errors.push(error) })
    const socket = createConnection({ path })
    socket.write(Buffer.from([0, 0]))
    socket.resume()
    await once(socket, 'close')
    expect(errors).toEqual([coded('TIMEOUT')])
  })

  test('clients beyond maxConnections are closed at once', async () => {
    const server = await serve([new MemoryExport({ name: 'disk', sizeBytes: MIB })], { maxConnections: 1 })
    const first = await join()
    await expect(NbdClient.connect({ path }, { exportName: 'disk' })).rejects.toEqual(coded('CLOSED'))
    expect(server.counters.refusedConnections).toBe(1)
    expect(await first.read(0, 512)).toHaveLength(512)
  })

  test('takes over the socket file of a dead server, never that of a living one; mode 0600; removed at the end', async () => {
    const child = createServer()
    await new Promise<void>((resolve) => child.listen({ path }, resolve))
    await expect(serve([])).rejects.toEqual(coded('CONFLICT'))
    await new Promise((resolve) => child.close(resolve))
    // A file nobody listens on: bound, then renamed so that closing does not remove it.
    const dead = createServer()
    await new Promise<void>((resolve) => dead.listen({ path: `${path}2` }, resolve))
    await rename(`${path}2`, path)
    await new Promise((resolve) => dead.close(resolve))
    const server = await serve([])
    expect((await stat(path)).mode & 0o777).toBe(0o600)
    await server[Symbol.asyncDispose]()
    expect(await readdir(root)).toEqual([])
  })

  test('speaks TCP, on a port of the system\'s choice', async () => {
    const server = await serve([new MemoryExport({ name: 'disk', sizeBytes: MIB })], { address: { host: '127.0.0.1', port: 0 } })
    const client = await NbdClient.connect(server.address, { exportName: 'disk' })
    open.push(client)
    expect(await client.read(0, 512)).toHaveLength(512)
  })

  test('disposal is idempotent, also while clients shake hands and while operations run', async () => {
    const disk = new MemoryExport({ name: 'disk', sizeBytes: MIB })
    disk.read = (_offsetBytes, _lengthBytes, signal?: AbortSignal) =>
      new Promise((_resolve, reject) => signal?.addEventListener('abort', () => reject(new CdpError('ABORTED', 'gone'))))
    const server = await serve([disk])
    const client = await join()
    const reading = expect(client.read(0, 512)).rejects.toEqual(coded('CLOSED'))
    const shaking = createConnection({ path })
    shaking.on('error', () => undefined)
    await once(shaking, 'data')
    await until(() => server.counters.requests === 1)
    await Promise.all([server[Symbol.asyncDispose](), server[Symbol.asyncDispose]()])
    await reading
    await client.closed
    expect(server.counters.openConnections).toBe(0)
    await expect(NbdClient.connect({ path }, { exportName: 'disk' })).rejects.toEqual(coded('UNREACHABLE'))
    shaking.destroy()
  })
})
