import { describe, expect, test } from '@jest/globals'
import { readChains } from './block-state.ts'
import type { BlockDevice } from './block-state.ts'
import { readDiskCounters } from './counters.ts'
import { describeDisk, keyOfQdev } from './disks.ts'
import { bitmapName, bitmapNumber, keyOfName, namesOf } from './names.ts'

const device = (more: Partial<BlockDevice> = {}): BlockDevice => ({ qdev: 'scsi0', backend: 'drive-scsi0', rootNode: 'r', sizeBytes: 4096, readOnly: false, removable: false, ...more })
const nodes = (...drivers: [string, string][]) => ({ nodes: drivers.map(([name, driver]) => ({ name, driver, bitmaps: [] })) })

describe('disks', () => {
  test.each([['scsi0', 'scsi0'], ['/machine/peripheral/virtio12/virtio-backend', 'virtio12'], ['sata3', 'sata3'], ['ide2', 'ide2'],
    ['/machine/system.flash1', undefined], ['efidisk0', undefined], ['', undefined], ['scsi100', undefined]])('the key of %j is %j', (qdev, key) => {
    expect(keyOfQdev(qdev)).toBe(key)
  })

  test('our own nodes and filters of running jobs are looked through', () => {
    const state = nodes(['cdp-shield-scsi0', 'raw'], ['cdp-filter-scsi0', 'mirror_top'], ['#block1', 'qcow2'], ['#block0', 'file'], ['#block7', 'copy-before-write'])
    const plain = describeDisk(device(), ['#block1', '#block0'], state)
    expect(plain).toMatchObject({ shape: '8.4', rootNode: '#block1', formatNode: '#block1', bitmapNode: '#block1', readNode: '#block1', throttleNode: undefined })
    expect(describeDisk(device(), ['#block7', 'cdp-shield-scsi0', 'cdp-filter-scsi0', '#block1', '#block0'], state)).toEqual(plain)
  })

  test('on 9.x the bitmap sits on the throttle node and bulk reads go below it', () => {
    const state = nodes(['cdp-filter-scsi0', 'mirror_top'], ['drive-scsi0', 'throttle'], ['f0', 'raw'], ['e0', 'file'])
    const chain = ['cdp-filter-scsi0', 'drive-scsi0', 'f0', 'e0']
    expect(describeDisk(device({ backend: '' }), chain, state)).toMatchObject({ shape: '9.x', rootNode: 'drive-scsi0', bitmapNode: 'drive-scsi0', throttleNode: 'drive-scsi0', formatNode: 'f0', readNode: 'f0' })
  })

  test('CD-ROMs, read-only media and graphs of neither kind are told apart', () => {
    const state = nodes(['r', 'raw'])
    expect(describeDisk(device({ removable: true }), ['r'], state)).toBeUndefined()
    expect(describeDisk(device({ readOnly: true }), ['r'], state)).toBeUndefined()
    expect(describeDisk(device(), [], state)).toBeUndefined()
    expect(describeDisk(device({ backend: '' }), ['r'], state)?.shape).toBe('unknown')
  })
})

describe('names', () => {
  test('the key can be read back from every name, and bitmaps from their number', () => {
    for (const name of Object.values(namesOf('virtio15'))) expect(keyOfName(name)).toBe('virtio15')
    for (const foreign of ['drive-scsi0', 'cdp-', 'cdp-bitmap-1', 'xcdp-job-scsi0']) expect(keyOfName(foreign)).toBeUndefined()
    expect(bitmapNumber(bitmapName(7))).toBe(7)
    for (const foreign of ['cdp-bitmap-', 'cdp-bitmap-x', 'bitmap-1', 'cdp-bitmap-1 ']) expect(bitmapNumber(foreign)).toBeUndefined()
  })
})

describe('counters', () => {
  const stats = { wr_bytes: 4096, wr_operations: 1, unmap_bytes: 8, unmap_operations: 2, failed_wr_operations: 3, failed_unmap_operations: 4 }
  const job = { id: 'cdp-job-scsi0', type: 'mirror', status: 'ready', ready: true, paused: false, failed: false }

  test.each([
    [['cdp-filter-scsi0', 'drive-scsi0', 'f'], true],
    [['cdp-shield-scsi0', 'cdp-filter-scsi0', '#block1'], true],
    // A backup's filter above the shield.
    [['#block7', 'cdp-shield-scsi0', 'cdp-filter-scsi0', '#block1'], true],
    [['drive-scsi0', 'f'], false],
    [['#block9', '#block8'], false],
  ])('a job and a chain of %j: the guest passes it: %j', (chain, onPath) => {
    const entry = chain.reduceRight<object | undefined>((below, name) => ({ 'node-name': name, ...(below === undefined ? {} : { parent: below }) }), undefined)
    expect(readDiskCounters([{ device: '', qdev: 'scsi0', stats, ...entry }], [job]).get('scsi0')).toEqual({
      key: 'scsi0', wrBytes: 4096, wrOperations: 1, unmapBytes: 8, unmapOperations: 2, failedWrOperations: 3, failedUnmapOperations: 4,
      job: { status: 'ready', ready: true, paused: false, failed: false }, onPath })
  })

  test('a shield without a job is not the way through us, and a counter that is no number is refused', () => {
    expect(readDiskCounters([{ device: '', qdev: 'scsi0', 'node-name': 'cdp-shield-scsi0', stats }], []).get('scsi0')).toMatchObject({ onPath: false, job: undefined })
    expect(() => readDiskCounters([{ device: '', qdev: 'scsi0', stats: { ...stats, wr_bytes: 2 ** 60 } }], [])).toThrow(expect.objectContaining({ code: 'QMP_PROTOCOL' }))
  })

  test('the nodes of a disk are listed from the root down', () => {
    const chain = { 'node-name': 'top', stats: {}, parent: { 'node-name': 'middle', parent: { 'node-name': 'file' } } }
    expect([...readChains([{ qdev: 'scsi0', device: '', ...chain }, { device: 'x' }])]).toEqual([['scsi0', ['top', 'middle', 'file']]])
  })
})
