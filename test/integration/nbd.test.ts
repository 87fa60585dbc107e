// Our NBD server against other people's clients, our client against other people's servers.
import { execFile, spawn, type ChildProcess } from 'node:child_process'
import { once } from 'node:events'
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { createConnection } from 'node:net'
import { promisify } from 'node:util'
import { afterAll, afterEach, beforeAll, describe, expect, test } from '@jest/globals'
import { checkHandshake, MemoryExport, NBD_STATE_HOLE, NBD_STATE_ZERO, NbdClient, NbdServer, type NbdClientOptions } from '../../core/nbd/index.ts'

const run = promisify(execFile)
const MIB = 1024 * 1024
const ZERO = NBD_STATE_HOLE | NBD_STATE_ZERO
let root = ''

beforeAll(async () => {
  root = await mkdtemp('/tmp/cdp-')
})
afterAll(async () => {
  await rm(root, { recursive: true })
})

/** Pseudo-random bytes that no compressor or zero detection shrinks. */
const noise = (sizeBytes: number): Buffer => {
  const out = Buffer.alloc(sizeBytes)
  const { imul } = Math // a global is slow to look up in jest's realm
  let state = 12_345
  for (let at = 0; at + 4 <= sizeBytes; at += 4) {
    state = (imul(state, 1_664_525) + 1_013_904_223) >>> 0
    out.writeUInt32LE((state ^ (state >>> 15)) >>> 0, at)
  }
  return out
}

describe('our server', () => {
  const disk = new MemoryExport({ name: 'disk', sizeBytes: 64 * MIB, description: 'a writable disk' })
  const point = new MemoryExport({ name: 'point', sizeBytes: 32 * MIB, readOnly: true, sparseReads: true, description: 'a recovery point' })
  const exports = [disk, point]
  const errors: unknown[] = []
  let server: NbdServer
  const uri = (name: string): string => `nbd+unix:///${name}?socket=${root}/server`
  const qemuIo = async (...commands: string[]): Promise<string> =>
    (await run('qemu-io', ['-f', 'raw', ...commands.flatMap((command) => ['-c', command]), uri('disk')])).stdout

  beforeAll(async () => {
    noise(3 * MIB).copy(point.bytes, 5 * MIB)
    point.bytes.fill(0x42, 20 * MIB + 4096, 20 * MIB + 8192)
    server = await NbdServer.listen({
      address: { path: `${root}/server` },
      findExport: (name) => exports.find((one) => one.name === name),
      listExports: () => exports,
      onConnectionError: (error) => errors.push(error),
    })
  })
  afterAll(async () => {
    await server[Symbol.asyncDispose]()
  })
  afterEach(() => {
    expect(errors).toEqual([])
    expect(server.counters.protocolErrors).toBe(0)
  })

  test('nbdinfo sees what was offered, lists both exports and maps the sparse one', async () => {
    const info = JSON.parse((await run('nbdinfo', ['--json', uri('disk')])).stdout) as { exports: Record<string, unknown>[] }
    expect(info).toMatchObject({ protocol: 'newstyle-fixed', structured: true })
    expect(info.exports[0]).toMatchObject({
      'export-name': 'disk', description: 'a writable disk', 'export-size': 64 * MIB, is_read_only: false, can_df: true, can_fua: true, can_flush: true,
      can_trim: true, can_zero: true, can_fast_zero: true, can_multi_conn: true, contexts: ['base:allocation'],
      block_size_minimum: 1, block_size_preferred: 4096, block_size_maximum: 32 * MIB,
    })
    const listed = JSON.parse((await run('nbdinfo', ['--json', '--list', uri('')])).stdout) as { exports: Record<string, unknown>[] }
    expect(listed.exports.map((one) => [one['export-name'], one['is_read_only']])).toEqual([['disk', false], ['point', true]])
    const map = JSON.parse((await run('nbdinfo', ['--json', '--map', uri('point')])).stdout) as { offset: number; length: number; type: number }[]
    expect(map.map(({ offset, length, type }) => [offset, length, type])).toEqual([
      [0, 5 * MIB, ZERO], [5 * MIB, 3 * MIB, 0], [8 * MIB, 12 * MIB + 4096, ZERO], [20 * MIB + 4096, 4096, 0], [20 * MIB + 8192, 12 * MIB - 8192, ZERO],
    ])
    await expect(run('nbdinfo', [uri('nothing')])).rejects.toMatchObject({ stderr: expect.stringContaining('No such file or directory for export: nothing') })
  })

  test('qemu-io writes, flushes, discards, zeroes and reads back; bytes in memory agree', async () => {
    await qemuIo('write -P 0x5a 4096 1M', 'write -f -P 0x5b 1000 24', 'write -z 8192 4096', 'write -z -u 16384 4096', 'discard 24576 4096', 'flush')
    expect(await qemuIo('read -P 0x5a 4096 4096', 'read -P 0 8192 4096', 'read -P 0 16384 4096', 'read -P 0x5b 1000 24')).not.toContain('failed')
    expect(disk.bytes.subarray(4096, 8192).every((byte) => byte === 0x5a)).toBe(true)
    expect(disk.bytes.subarray(1000, 1024).every((byte) => byte === 0x5b)).toBe(true)
    for (const atBytes of [8192, 16_384, 24_576]) expect(disk.bytes.subarray(atBytes, atBytes + 4096).every((byte) => byte === 0)).toBe(true)
    expect(disk.bytes[28_672]).toBe(0x5a)
    expect(disk.flushCount).toBeGreaterThan(0)
    const beyond = await run('qemu-io', ['-f', 'raw', '-c', 'write 64M 4096', uri('disk')]).catch((error: unknown) => error)
    expect(beyond).toMatchObject({ code: 1 })
  })

  test('qemu-img: info, map, convert, compare, both ways', async () => {
    expect(JSON.parse((await run('qemu-img', ['info', '--output=json', uri('point')])).stdout)).toMatchObject({ 'virtual-size': 32 * MIB, format: 'raw' })
    const { stdout } = await run('qemu-img', ['map', '--output=json', '-f', 'raw', uri('point')])
    const map = JSON.parse(stdout) as { start: number; length: number; data: boolean }[]
    expect(map.filter((part) => part.data).map((part) => [part.start, part.length])).toEqual([[5 * MIB, 3 * MIB], [20 * MIB + 4096, 4096]])
    await run('qemu-img', ['convert', '-f', 'raw', '-O', 'qcow2', uri('point'), `${root}/copy.qcow2`])
    expect((await run('qemu-img', ['compare', '-f', 'raw', '-F', 'qcow2', uri('point'), `${root}/copy.qcow2`])).stdout).toContain('identical')
    await run('qemu-img', ['convert', '-n', '-f', 'qcow2', '-O', 'raw', `${root}/copy.qcow2`, uri('disk')])
    expect(disk.bytes.subarray(0, 32 * MIB).equals(point.bytes)).toBe(true)
    const backing = ['create', '-q', '-f', 'qcow2', '-F', 'raw', '-b', uri('point'), `${root}/overlay.qcow2`]
    await run('qemu-img', backing)
    await run('qemu-io', ['-c', 'write -P 1 0 64k', '-c', `read -P 0x42 ${20 * MIB + 4096} 4096`, `${root}/overlay.qcow2`])
    expect(point.bytes[0]).toBe(0)
  })

  test('nbdcopy with many connections and requests, out and in', async () => {
    await run('nbdcopy', ['--connections=4', '--requests=32', uri('point'), `${root}/copy.raw`])
    expect((await readFile(`${root}/copy.raw`)).equals(point.bytes)).toBe(true)
    const image = noise(64 * MIB)
    await writeFile(`${root}/in.raw`, image)
    await run('nbdcopy', ['--flush', '--connections=4', '--requests=32', `${root}/in.raw`, uri('disk')])
    expect(disk.bytes.equals(image)).toBe(true)
    await expect(run('nbdcopy', [`${root}/copy.raw`, uri('point')])).rejects.toMatchObject({ code: 1 })
  })

  test.each(['randwrite', 'randrw'])('fio %s with verification of what it reads back', async (rw) => {
    const { stdout } = await run('fio', [
      '--name=nbd', '--verify_state_save=0', '--ioengine=nbd', `--uri=${uri('disk')}`, `--rw=${rw}`, '--bsrange=4k-256k', '--iodepth=16', '--size=64m', '--io_size=64m',
      '--verify=crc32c', '--verify_fatal=1', '--randseed=7', '--output-format=json', '--fsync=64',
    ])
    const report = JSON.parse(stdout.slice(stdout.indexOf('{'))) as { jobs: { error: number; write: { io_bytes: number } }[] }
    expect(report.jobs[0]?.error).toBe(0)
    expect(report.jobs[0]?.write.io_bytes).toBeGreaterThan(20 * MIB)
  })
})

describe('our client', () => {
  const children: { child: ChildProcess; stop: NodeJS.Signals }[] = []
  const clients: NbdClient[] = []
  afterEach(async () => {
    for (const client of clients.splice(0)) await client[Symbol.asyncDispose]()
    for (const { child, stop } of children.splice(0)) {
      if (child.exitCode !== null || child.signalCode !== null) continue
      child.kill(stop)
      await once(child, 'exit')
    }
  })

  /** Starts a server and waits until a full handshake with it succeeds. */
  const started = async (command: string, args: string[], path: string, exportName: string): Promise<void> => {
    const child = spawn(command, args, { stdio: ['ignore', 'ignore', 'pipe'] })
    let said = ''
    child.stderr.on('data', (chunk: Buffer) => (said += chunk.toString()))
    children.push({ child, stop: 'SIGTERM' })
    for (;;) {
      if (child.exitCode !== null) throw new RangeError(`${command} ended: ${said}`)
      const answer = await checkHandshake({ path }, exportName, 5_000).catch((error: unknown) => error)
      if (answer === undefined) return
      expect(answer).toMatchObject({ code: 'UNREACHABLE' })
      // No server sends a signal when it listens; let the event loop turn.
      await new Promise((resolve) => setImmediate(resolve))
    }
  }
  const join = async (path: string, options: NbdClientOptions): Promise<NbdClient> => {
    const client = await NbdClient.connect({ path }, options)
    clients.push(client)
    return client
  }

  test('qemu-nbd: base:allocation, holes, writes, zeroes, trim, flush', async () => {
    const image = `${root}/client.raw`
    const content = Buffer.concat([Buffer.alloc(MIB), noise(MIB), Buffer.alloc(6 * MIB)])
    await run('qemu-img', ['create', '-q', '-f', 'raw', image, '8M'])
    await started('qemu-nbd', ['-k', `${root}/qn`, '-f', 'raw', '-x', 'img', '-t', '-e', '4', '--discard=unmap', image], `${root}/qn`, 'img')
    const client = await join(`${root}/qn`, { exportName: 'img', metaContexts: ['base:allocation', 'qemu:dirty-bitmap:none'] })
    expect(client).toMatchObject({ sizeBytes: 8 * MIB, readOnly: false, structuredReplies: true, metaContexts: ['base:allocation'] })
    await client.write(0, content, { fua: true })
    await client.trim(0, MIB)
    await client.writeZeroes(2 * MIB, 6 * MIB)
    await client.flush()
    expect((await client.blockStatus(0, 8 * MIB)).get('base:allocation')).toEqual([
      { lengthBytes: MIB, flags: ZERO }, { lengthBytes: MIB, flags: 0 }, { lengthBytes: 6 * MIB, flags: ZERO },
    ])
    const target = Buffer.alloc(8 * MIB, 0xee)
    const holes = await client.readInto(target, 0, 0, 8 * MIB)
    expect(target.equals(content)).toBe(true)
    // QEMU tells holes inside a structured read by itself.
    expect(holes.reduce((sum, range) => sum + range.lengthBytes, 0)).toBe(7 * MIB)
    const parts = await Promise.all(Array.from({ length: 64 }, (_, index) => client.read(index * 128 * 1024 + 512, 1024)))
    parts.forEach((part, index) => expect(part.equals(content.subarray(index * 128 * 1024 + 512, index * 128 * 1024 + 1536))).toBe(true))
    await expect(NbdClient.connect({ path: `${root}/qn` }, { exportName: 'other' })).rejects.toMatchObject({ code: 'NBD_REFUSED' })
    await client[Symbol.asyncDispose]()
    expect((await readFile(image)).equals(content)).toBe(true)
  })

  test('qemu-storage-daemon: a real dirty bitmap made over QMP, rotated and exported', async () => {
    const image = `${root}/bitmap.qcow2`
    await run('qemu-img', ['create', '-q', '-f', 'qcow2', image, '16M'])
    await started('qemu-storage-daemon', [
      '--blockdev', `driver=qcow2,node-name=disk,file.driver=file,file.filename=${image}`,
      '--nbd-server', `addr.type=unix,addr.path=${root}/qsd`, '--export', 'type=nbd,id=rw,node-name=disk,name=rw,writable=on',
      '--chardev', `socket,id=m,path=${root}/qmp,server=on,wait=off`, '--monitor', 'chardev=m',
    ], `${root}/qsd`, 'rw')
    const qmp = await qmpSession(`${root}/qmp`)
    await qmp.run('block-dirty-bitmap-add', { node: 'disk', name: 'a', granularity: 65_536 })
    const writer = await join(`${root}/qsd`, { exportName: 'rw' })
    await writer.write(0, Buffer.alloc(1000, 1))
    await writer.write(5 * MIB + 1, Buffer.alloc(2 * 65_536, 2))
    await writer.writeZeroes(10 * MIB, MIB)
    await qmp.run('transaction', {
      actions: [
        { type: 'block-dirty-bitmap-add', data: { node: 'disk', name: 'b' } },
        { type: 'block-dirty-bitmap-disable', data: { node: 'disk', name: 'a' } },
      ],
    })
    await writer.write(14 * MIB, Buffer.alloc(4096, 3))
    await qmp.run('block-export-add', { type: 'nbd', id: 'ro', 'node-name': 'disk', name: 'ro', bitmaps: ['a'] })
    const reader = await join(`${root}/qsd`, { exportName: 'ro', metaContexts: ['base:allocation', 'qemu:dirty-bitmap:a'] })
    expect([...reader.metaContexts].sort()).toEqual(['base:allocation', 'qemu:dirty-bitmap:a'])
    expect(reader.readOnly).toBe(true)
    const statuses = await reader.blockStatus(0, 16 * MIB)
    expect(statuses.get('qemu:dirty-bitmap:a')).toEqual([
      { lengthBytes: 65_536, flags: 1 }, { lengthBytes: 5 * MIB - 65_536, flags: 0 }, { lengthBytes: 3 * 65_536, flags: 1 },
      { lengthBytes: 5 * MIB - 3 * 65_536, flags: 0 }, { lengthBytes: MIB, flags: 1 }, { lengthBytes: 5 * MIB, flags: 0 },
    ])
    const allocation = statuses.get('base:allocation') ?? []
    expect(allocation.reduce((sum, extent) => sum + extent.lengthBytes, 0)).toBe(16 * MIB)
    expect(allocation[0]).toEqual({ lengthBytes: 65_536, flags: 0 })
    await expect(reader.write(0, Buffer.alloc(512))).rejects.toMatchObject({ code: 'NBD_REFUSED' })
    qmp.close()
  })

  test('target of a QEMU mirror job: every write arrives; when our server ends the source goes on and the job says so', async () => {
    const image = `${root}/mirror.raw`
    await run('qemu-img', ['create', '-q', '-f', 'raw', image, '16M'])
    const target = new MemoryExport({ name: 'target', sizeBytes: 16 * MIB })
    await using server = await NbdServer.listen({ address: { path: `${root}/target` }, findExport: () => target, listExports: () => [target] })
    await started('qemu-storage-daemon', [
      '--blockdev', `driver=raw,node-name=disk,file.driver=file,file.filename=${image}`,
      '--nbd-server', `addr.type=unix,addr.path=${root}/source`, '--export', 'type=nbd,id=rw,node-name=disk,name=rw,writable=on',
      '--chardev', `socket,id=m,path=${root}/qmp2,server=on,wait=off`, '--monitor', 'chardev=m',
    ], `${root}/source`, 'rw')
    const qmp = await qmpSession(`${root}/qmp2`)
    await qmp.run('blockdev-add', {
      driver: 'nbd', 'node-name': 'target', server: { type: 'unix', path: `${root}/target` }, export: 'target', 'reconnect-delay': 0,
    })
    await qmp.run('blockdev-mirror', {
      'job-id': 'capture', device: 'disk', target: 'target', sync: 'none', 'copy-mode': 'write-blocking', 'on-target-error': 'report', granularity: 4096,
    })
    const jobs = async (): Promise<{ ready: boolean }[]> => (await qmp.run('query-block-jobs', {})) as { ready: boolean }[]
    while (!(await jobs())[0]?.ready) expect(await jobs()).toHaveLength(1)

    const guest = await join(`${root}/source`, { exportName: 'rw' })
    const content = noise(16 * MIB)
    await Promise.all(Array.from({ length: 1024 }, (_, index) => guest.write(index * 16_384, content.subarray(index * 16_384, (index + 1) * 16_384))))
    await guest.writeZeroes(MIB + 512, 70_000 - (70_000 % 512))
    await guest.write(3 * MIB + 512, content.subarray(0, 1024))
    content.fill(0, MIB + 512, MIB + 512 + 70_000 - (70_000 % 512))
    content.copyWithin(3 * MIB + 512, 0, 1024)
    // Write-blocking: what the guest has an acknowledgement for is here already.
    expect(target.bytes.equals(content)).toBe(true)
    expect(server.counters).toMatchObject({ protocolErrors: 0, errorReplies: 0 })

    await server[Symbol.asyncDispose]()
    await guest.write(0, Buffer.alloc(4096, 0x77), { fua: true })
    expect((await guest.read(0, 4096)).equals(Buffer.alloc(4096, 0x77))).toBe(true)
    while ((await jobs()).length > 0) await guest.flush()
    expect(target.openCount).toBe(0)
    qmp.close()
  })

  test('nbdkit with errors: each failed read is one NBD_REFUSED, the rest arrives', async () => {
    await started('nbdkit', ['-f', '-U', `${root}/nk`, '--filter=error', 'pattern', '8M', 'error-pread=EIO', 'error-pread-rate=30%'], `${root}/nk`, '')
    const client = await join(`${root}/nk`, { exportName: '', maxRequestsInFlight: 8 })
    const results = await Promise.allSettled(Array.from({ length: 200 }, (_, index) => client.read(index * 32_768, 32_768)))
    const failed = results.filter((result) => result.status === 'rejected')
    expect(failed.length).toBeGreaterThan(5)
    expect(failed.length).toBeLessThan(195)
    for (const result of failed) expect(result.reason).toMatchObject({ code: 'NBD_REFUSED', context: { errno: 'EIO' } })
    results.forEach((result, index) => {
      // nbdkit's pattern: each 8 bytes hold their own offset, big-endian.
      if (result.status === 'fulfilled') expect(result.value.readBigUInt64BE(8)).toBe(BigInt(index * 32_768 + 8))
    })
  })

  test('nbdkit with delays: requests overlap, an abort is immediate, killing the server rejects the rest with CLOSED', async () => {
    await started('nbdkit', ['-f', '-U', `${root}/nd`, '--filter=delay', 'memory', '8M', 'rdelay=200ms'], `${root}/nd`, '')
    const client = await join(`${root}/nd`, { exportName: '', metaContexts: ['base:allocation'] })
    const startMs = performance.now()
    await Promise.all(Array.from({ length: 10 }, (_, index) => client.read(index * 4096, 4096)))
    expect(performance.now() - startMs).toBeLessThan(1_500)
    const giveUp = new AbortController()
    const abandoned = client.read(0, 4096, giveUp.signal)
    giveUp.abort()
    await expect(abandoned).rejects.toMatchObject({ code: 'ABORTED' })
    const rest = Promise.allSettled(Array.from({ length: 20 }, (_, index) => client.read(index * 4096, 4096)))
    children[0]?.child.kill('SIGKILL')
    for (const result of await rest) expect(result).toMatchObject({ status: 'rejected', reason: { code: 'CLOSED' } })
    await client.closed
  })

  test.each([['--oldstyle', 'NBD_REFUSED'], ['--mask-handshake=0', undefined], ['--mask-handshake=1', undefined], ['--no-sr', undefined]])(
    'nbdkit %s', async (option, refusal) => {
      const path = `${root}/nk${option.length}${option.slice(-1)}`
      const args = ['-f', '-U', path, option, 'pattern', '1M']
      if (refusal !== undefined) {
        const child = spawn('nbdkit', args, { stdio: 'ignore' })
        children.push({ child, stop: 'SIGTERM' })
        let answer: unknown
        do answer = await checkHandshake({ path }, '', 5_000).catch((error: unknown) => error)
        while ((answer as { code?: string }).code === 'UNREACHABLE')
        expect(answer).toMatchObject({ code: refusal })
        return
      }
      await started('nbdkit', args, path, '')
      const client = await join(path, { exportName: '', metaContexts: ['base:allocation'] })
      expect(client).toMatchObject({ sizeBytes: MIB, structuredReplies: option === '--mask-handshake=1' })
      expect((await client.read(4096, 8)).readBigUInt64BE(0)).toBe(4096n)
    },
  )
})

/** Just enough QMP for one test: commands one after the other, no events. */
const qmpSession = async (path: string): Promise<{ run(execute: string, args: object): Promise<unknown>; close(): void }> => {
  const socket = createConnection({ path })
  let text = ''
  const line = async (): Promise<Record<string, unknown>> => {
    while (!text.includes('\n')) text += ((await once(socket, 'data')) as [Buffer])[0].toString()
    const end = text.indexOf('\n')
    const message = JSON.parse(text.slice(0, end)) as Record<string, unknown>
    text = text.slice(end + 1)
    return message
  }
  const command = async (execute: string, args: object): Promise<unknown> => {
    socket.write(`${JSON.stringify({ execute, arguments: args })}\n`)
    for (;;) {
      const message = await line()
      if ('error' in message) throw new RangeError(`${execute}: ${JSON.stringify(message.error)}`)
      if ('return' in message) return message.return
    }
  }
  expect(await line()).toHaveProperty('QMP')
  await command('qmp_capabilities', {})
  return { run: command, close: () => socket.destroy() }
}
