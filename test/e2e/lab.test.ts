import { afterEach, beforeEach, describe, expect, test } from '@jest/globals'
import { spawn } from 'node:child_process'
import { existsSync, mkdirSync, readFileSync, rmSync } from 'node:fs'
import {
  attachGuest, bootGuest, checkExt4, checkPrefix, createOverlay, durableRecord, endProcess, extractExt4, isAlive, lastingLeaksOf, makeBlankImage, makeExt4Image, makeTempDir, manifestDifferences, manifestOf, pathsOf,
  GroupWriter, ioGap, readJournal, runRansomware, runTool, startGapMeter, startJournalWriter, startVm, tool, unregisterVm, untilRecord, waitForEnd, writeDocuments, type TempDir, type VmShape,
} from '../lab/index.ts'

const shapes: readonly VmShape[] = ['8.4', '9.x']
const MiB = 1 << 20

let dir: TempDir
beforeEach(() => {
  dir = makeTempDir()
})
afterEach(async () => {
  const left = await lastingLeaksOf(dir.path)
  await dir[Symbol.asyncDispose]()
  expect(left).toEqual([])
})

const disk = async (name: string, options: { format?: 'raw' | 'qcow2' } = {}): Promise<string> => {
  const path = `${dir.path}/${name}`
  await makeExt4Image(path, 128 * MiB, options)
  return path
}

const journalsOf = async (images: readonly { path: string; format: 'raw' | 'qcow2' }[]): Promise<string[]> => {
  const texts: string[] = []
  for (const [index, { path, format }] of images.entries()) {
    const target = `${dir.path}/files-${index}`
    mkdirSync(target)
    await extractExt4(path, '/journal', target, format)
    const { stdout } = await tool('sh', ['-c', 'cat "$1"/journal/*.log', '-', target])
    texts.push(stdout)
  }
  return texts
}

describe.each(shapes)('a guest in the shape of %s', (shape) => {
  test('boots, runs commands, goes down by the power button and leaves clean file systems', async () => {
    const disks = [
      { key: 'scsi0', path: await disk('a.raw'), format: 'raw' as const },
      { key: 'scsi1', path: await disk('b.qcow2', { format: 'qcow2' }), format: 'qcow2' as const },
      { key: 'virtio0', path: await disk('c.raw'), format: 'raw' as const },
    ]
    await using guest = await bootGuest({ rootDir: dir.path, vmId: 101, shape, disks, agent: true, mount: ['scsi0', 'scsi1', 'virtio0'] })
    console.log(`boot in the shape of ${shape}: ${Math.round(guest.bootMs)} ms`)

    const blocks = (await guest.vm.monitor.run('query-block')) as { device: string; qdev: string; inserted: { 'node-name': string; file: string } }[]
    const byQdev = new Map(blocks.map((block) => [block.qdev.replace('/machine/peripheral/', '').replace('/virtio-backend', ''), block]))
    for (const { key, path } of disks) {
      const block = byQdev.get(key)
      expect(block?.device).toBe(shape === '8.4' ? `drive-${key}` : '')
      if (shape === '9.x') expect(block?.inserted['node-name']).toBe(`drive-${key}`)
      else expect(block?.inserted['node-name']).toMatch(/^#block\d+$/)
      expect(block?.inserted.file).toContain(path)
    }

    expect(await guest.run('echo out; echo err >&2; exit 7')).toEqual({ exitCode: 7, stdout: 'out\n', stderr: 'err\n' })
    const numbers = await guest.check('seq 20000; cat >/dev/ttyS0 </proc/version')
    expect(numbers).toBe(Array.from({ length: 20_000 }, (_, index) => `${index + 1}\n`).join(''))
    const long = 'x'.repeat(10_000)
    expect(await guest.check(`echo ${long}`)).toBe(`${long}\n`)
    const many = await Promise.all(Array.from({ length: 8 }, (_, index) => guest.check(`echo ${index}; seq 300 | md5sum`)))
    expect(many.map((text) => text.split('\n')[0])).toEqual(['0', '1', '2', '3', '4', '5', '6', '7'])
    await expect(guest.run('sleep 60', { deadlineMs: 500 })).rejects.toMatchObject({ code: 'TIMEOUT' })
    const job = guest.start('echo begun; sleep 60')
    await expect(guest.end(job)).resolves.toMatchObject({ stdout: 'begun\n' })

    const noisy = guest.start('while :; do echo noise; printf "< garbage"; usleep 5000; done >/dev/ttyS1')
    expect((await guest.check('seq 3000', { deadlineMs: 60_000 })).length).toBe(13_893)
    await guest.end(noisy, 'KILL')

    await guest.check('for key in scsi0 scsi1 virtio0; do echo "$key" >/mnt/$key/key; done')
    expect(await guest.stop()).toBe(true)
    expect(isAlive(guest.vm.pid)).toBe(false)
    for (const { path, format } of disks) expect(await checkExt4(path, dir.path, format)).toMatchObject({ clean: true, replayed: false })
    mkdirSync(`${dir.path}/out`)
    await extractExt4(disks[1].path, '/key', `${dir.path}/out`, 'qcow2')
    expect(readFileSync(`${dir.path}/out/key`, 'utf8')).toBe('scsi1\n')
  }, 120_000)

  test('kill -9 under fsync load: the journal replay leaves clean file systems, and the records on both disks are a prefix that has all acknowledged ones', async () => {
    const disks = [
      { key: 'scsi0', path: await disk('a.raw'), format: 'raw' as const },
      { key: 'scsi1', path: await disk('b.raw'), format: 'raw' as const },
    ]
    await using guest = await bootGuest({ rootDir: dir.path, vmId: 102, shape, disks, mount: ['scsi0', 'scsi1'] })
    const startedAt = performance.now()
    const job = startJournalWriter(guest, ['/mnt/scsi0', '/mnt/scsi1'])
    await untilRecord(guest, 200)
    const durable = await durableRecord(guest)
    console.log(`${Math.round((durable * 1000) / (performance.now() - startedAt))} fsyncs a second in the shape of ${shape}`)
    await guest.kill()
    await expect(job.ended).rejects.toMatchObject({ code: 'CLOSED' })
    expect(existsSync(pathsOf(dir.path, 102).pid)).toBe(false)
    for (const { path } of disks) expect(await checkExt4(path, dir.path)).toMatchObject({ clean: true, replayed: true })
    const report = checkPrefix(await journalsOf(disks))
    expect(report).toMatchObject({ ok: true })
    expect(report.last).toBeGreaterThanOrEqual(durable)
  }, 120_000)
})

test('two guests, each record durable in one before the next is begun in the other: both killed, the records are a prefix', async () => {
  const shapeOf = { 101: '9.x', 102: '8.4' } as const
  const images: { path: string; format: 'raw' }[] = []
  const guests = await Promise.all(
    ([101, 102] as const).map(async (vmId) => {
      images.push({ path: `${dir.path}/${vmId}.raw`, format: 'raw' })
      return bootGuest({ rootDir: dir.path, vmId, shape: shapeOf[vmId], disks: [{ key: 'scsi0', path: await disk(`${vmId}.raw`), format: 'raw' }], mount: ['scsi0'] })
    }),
  )
  await using first = guests[0]
  await using second = guests[1]
  console.log(`two at once: ${guests.map(({ bootMs }) => Math.round(bootMs)).join(' and ')} ms`)
  startGapMeter(first, '/mnt/scsi0')
  const writer = new GroupWriter(guests.map((guest) => ({ guest, dir: '/mnt/scsi0' })))
  const startedAt = performance.now()
  while (writer.durable < 40) await first.check('usleep 20000')
  console.log(`group records: ${Math.round((writer.durable * 1000) / (performance.now() - startedAt))} a second`)
  const gap = await ioGap(first)
  expect(gap).toMatchObject({ failed: 0 })
  expect(gap.writes).toBeGreaterThan(10)
  expect(gap.longestGapMs).toBeLessThan(5_000)
  const durable = writer.durable
  await Promise.all([first.kill(), second.kill()])
  await expect(writer.stop()).rejects.toMatchObject({ code: 'CLOSED' })
  const report = checkPrefix(await journalsOf(images))
  expect(report).toMatchObject({ ok: true })
  expect(report.last).toBeGreaterThanOrEqual(durable)
}, 120_000)

test.each(shapes)('a VM without an OS takes load through its own NBD server in the shape of %s', async (shape) => {
  const disks = []
  for (const key of ['scsi0', 'scsi1', 'virtio0']) {
    await makeBlankImage(`${dir.path}/${key}.raw`, 16 * MiB)
    disks.push({ key, path: `${dir.path}/${key}.raw`, format: 'raw' as const, shareRw: true })
  }
  await using vm = await startVm({ rootDir: dir.path, vmId: 103, shape, disks, nbdServerPath: `${dir.path}/load` })
  for (const { key, path } of disks) {
    await tool('qemu-io', ['-f', 'raw', '-c', 'write -P 0x5a 1M 64k', '-c', 'flush', `nbd+unix:///${key}?socket=${dir.path}/load`])
    await tool('qemu-io', ['-U', '-r', '-f', 'raw', '-c', 'read -P 0x5a 1M 64k', path]).then(({ stdout }) => expect(stdout).not.toContain('failed'))
  }
  expect(vm.running).toBe(true)
  await vm.kill()
  expect(vm.running).toBe(false)
}, 60_000)

test('the same VM boots from an overlay over an NBD export, and the export stays as it was', async () => {
  const base = await disk('base.raw')
  const socket = `${dir.path}/nbd`
  {
    await using guest = await bootGuest({ rootDir: dir.path, vmId: 101, shape: '9.x', disks: [{ key: 'scsi0', path: base, format: 'raw' }], mount: ['scsi0'] })
    await writeDocuments(guest, '/mnt/scsi0/documents', 50, 1)
    await guest.stop()
  }
  const before = (await tool('sha256sum', [base])).stdout
  const server = spawn('qemu-nbd', ['--read-only', '--persistent', '--shared=4', '-f', 'raw', '-x', 'point', '-k', socket, base], { stdio: 'ignore' })
  try {
    const uri = `nbd+unix:///point?socket=${socket}`
    await createOverlay(`${dir.path}/overlay.qcow2`, uri, 128 * MiB)
    await using guest = await bootGuest({ rootDir: dir.path, vmId: 201, shape: '9.x', disks: [{ key: 'scsi0', path: `${dir.path}/overlay.qcow2`, format: 'qcow2' }], mount: ['scsi0'] })
    const documents = await manifestOf(guest, '/mnt/scsi0/documents')
    expect(documents.size).toBe(50)
    expect(await runRansomware(guest, '/mnt/scsi0/documents')).toBe(50)
    expect(manifestDifferences(documents, await manifestOf(guest, '/mnt/scsi0/documents')).length).toBe(101)
    expect(await guest.stop()).toBe(true)
    expect(await checkExt4(`${dir.path}/overlay.qcow2`, dir.path, 'qcow2')).toMatchObject({ clean: true })
  } finally {
    await endProcess(server.pid!)
  }
  expect((await tool('sha256sum', [base])).stdout).toBe(before)
}, 120_000)

test('.conf and .vmlist follow the VMs, two under one root, started at once', async () => {
  const [a, b] = [await disk('a.raw'), await disk('b.raw')]
  const vms = await Promise.all([
    startVm({ rootDir: dir.path, vmId: 101, shape: '8.4', disks: [{ key: 'scsi0', path: a, format: 'raw' }] }),
    startVm({ rootDir: dir.path, vmId: 102, shape: '9.x', disks: [{ key: 'virtio0', path: b, format: 'raw' }] }),
  ])
  const list = (): unknown => JSON.parse(readFileSync(pathsOf(dir.path, 101).vmlist, 'utf8'))
  expect(list()).toMatchObject({ version: 2, ids: { 101: { node: 'lab', type: 'qemu' }, 102: { node: 'lab', type: 'qemu' } } })
  expect(readFileSync(pathsOf(dir.path, 101).config, 'utf8')).toContain(`\nscsi0: ${a},iothread=1,size=128M\n`)
  expect(Number(readFileSync(pathsOf(dir.path, 102).pid, 'utf8'))).toBe(vms[1].pid)
  await expect(startVm({ rootDir: dir.path, vmId: 101, shape: '8.4', disks: [] })).rejects.toMatchObject({ code: 'CONFLICT' })
  await Promise.all(vms.map((vm) => vm[Symbol.asyncDispose]()))
  await vms[0][Symbol.asyncDispose]()
  expect(existsSync(pathsOf(dir.path, 101).config)).toBe(true)
  unregisterVm(dir.path, 101)
  expect(Object.keys((list() as { ids: object }).ids)).toEqual(['102'])
}, 60_000)

test('QEMU that does not start says why and leaves nothing running', async () => {
  await tool('truncate', ['-s', '1M', `${dir.path}/a.raw`])
  const start = startVm({ rootDir: dir.path, vmId: 101, shape: '9.x', disks: [{ key: 'scsi0', path: `${dir.path}/a.raw`, format: 'raw', sizeBytes: MiB }, { key: 'scsi0', path: `${dir.path}/a.raw`, format: 'raw' }] })
  await expect(start).rejects.toMatchObject({ code: 'CLOSED', message: expect.stringContaining('scsi0') })
})

test('a guest that outlives its starter is taken over by another client, and cut off without its help', async () => {
  const image = await disk('a.raw')
  const first = await bootGuest({ rootDir: dir.path, vmId: 101, shape: '9.x', disks: [{ key: 'scsi0', path: image, format: 'raw' }], mount: ['scsi0'], outliveParent: true })
  await first.check('journal-writer main 70 /mnt/scsi0', { deadlineMs: 60_000 })
  first.detach()
  await using second = await attachGuest(dir.path, 101)
  expect(second.vm.pid).toBe(first.vm.pid)
  expect(checkPrefix([await readJournal(second, '/mnt/scsi0')])).toEqual({ ok: true, last: 70 })
  await second.vm.quit()
  expect(isAlive(first.vm.pid)).toBe(false)
  expect(await checkExt4(image, dir.path)).toMatchObject({ clean: true, replayed: true })
}, 90_000)

test('a boot that is given up leaves nothing', async () => {
  const over = new AbortController()
  const boot = bootGuest({ rootDir: dir.path, vmId: 101, shape: '8.4', disks: [], signal: over.signal, onStarted: () => over.abort() })
  await expect(boot).rejects.toMatchObject({ code: 'ABORTED' })
  expect(existsSync(pathsOf(dir.path, 101).pid)).toBe(false)
}, 30_000)

test('a VM dies with the process that started it, however that ends', async () => {
  const script = `
    import { startVm } from '${import.meta.dirname}/../lab/index.ts'
    const vm = await startVm({ rootDir: '${dir.path}', vmId: 101, shape: '9.x', disks: [] })
    console.log(vm.pid)
    process.kill(process.pid, 'SIGKILL')`
  const { signal, stdout } = await runTool(process.execPath, ['--input-type=module-typescript', '-e', script], { env: { NODE_OPTIONS: '--disable-warning=ExperimentalWarning' } })
  expect(signal).toBe('SIGKILL')
  expect(Number(stdout)).toBeGreaterThan(1)
  expect(await waitForEnd(Number(stdout), 5_000)).toBe(true)
  for (const path of Object.values(pathsOf(dir.path, 101))) rmSync(path, { force: true })
}, 30_000)

test('npm run lab: up starts two guests, status and run find them, a second up is refused, down ends them', async () => {
  const lab = async (...args: string[]): Promise<{ exitCode: number | null; value: Record<string, unknown>; stderr: string }> => {
    const { exitCode, stdout, stderr } = await runTool(process.execPath, [`${import.meta.dirname}/../lab/main.ts`, ...args, '--json', '--root', dir.path], { env: { NODE_OPTIONS: '--disable-warning=ExperimentalWarning' }, deadlineMs: 100_000 })
    return { exitCode, value: stdout === '' ? {} : (JSON.parse(stdout) as Record<string, unknown>), stderr }
  }
  const vms = [expect.objectContaining({ vmId: 101, shape: '9.x', running: true }), expect.objectContaining({ vmId: 102, shape: '8.4', running: true })]
  try {
    const up = await lab('up')
    expect(up.value).toMatchObject({ up: true, vms: expect.arrayContaining(vms) })
    console.log(`lab up: ${String(up.value['startMs'])} ms`)
    expect((await lab('status')).value).toMatchObject({ up: true, vms: expect.arrayContaining(vms) })
    expect((await lab('run', '102', 'ls /mnt')).value).toMatchObject({ exitCode: 0, stdout: 'scsi0\nscsi1\n' })
    expect(await lab('up')).toMatchObject({ exitCode: 1, stderr: expect.stringContaining('hint: npm run lab -- down') })
  } finally {
    expect((await lab('down')).value).toMatchObject({ up: false, stopped: expect.arrayContaining([{ vmId: 101, graceful: true }, { vmId: 102, graceful: true }]) })
  }
  expect((await lab('status')).value).toMatchObject({ up: false, vms: [] })
  expect((await lab('sideways')).exitCode).toBe(1)
}, 180_000)
