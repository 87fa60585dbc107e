import { mkdtemp, readFile, rm } from 'node:fs/promises'
import { join } from 'node:path'
import { expect, test } from '@jest/globals'
import { StateFile } from './state-file.ts'
import { newVmState } from './vm-state.ts'
import type { VmState } from './vm-state.ts'

test('what is noted while something else is being saved is neither lost nor taken back, and the file is behind until the next save', async () => {
  const dir = await mkdtemp('/tmp/cdp-')
  try {
    const file = new StateFile(join(dir, 'vm.json'), { ...newVmState('a/1'), disks: [{ disk: 0, key: 'scsi0', sizeBytes: 512, joining: true }] })
    const onDisk = async (): Promise<VmState> => JSON.parse(await readFile(file.path, 'utf8')) as VmState
    const saved = file.update((state) => ({ ...state, baseSeq: 7 }))
    await Promise.resolve()
    file.note((state) => ({ ...state, disks: [{ disk: 0, key: 'scsi0', sizeBytes: 512 }] }))
    await saved
    expect(file.state).toMatchObject({ baseSeq: 7, disks: [{ disk: 0, key: 'scsi0', sizeBytes: 512 }] })
    expect(file.state.disks[0]).not.toHaveProperty('joining')
    expect([file.isBehind, (await onDisk()).disks[0].joining]).toEqual([true, true])
    await file.update((state) => state)
    expect([file.isBehind, (await onDisk()).disks[0].joining, (await onDisk()).baseSeq]).toEqual([false, undefined, 7])
  } finally {
    await rm(dir, { recursive: true, force: true })
  }
})
