import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { afterEach, beforeEach, expect, test } from '@jest/globals'
import { proveFile } from './file-proof.ts'
import { StopNoteFile } from './stop-note-file.ts'

let directory = ''
beforeEach(async () => {
  directory = await mkdtemp('/tmp/cdp-m-')
})
afterEach(() => rm(directory, { recursive: true, force: true }))

const clean = {
  format: 1 as const, clean: { bootId: 'b', epoch: 7, lastSeq: 90, disks: [{ disk: 0, key: 'scsi0', sizeBytes: 4096 }], files: { scsi0: { path: '/x', device: '1', inode: '2', sizeBytes: '4096', ctimeNs: '5' } } },
}

test('a note comes back as it was written; forgotten, there is none', async () => {
  const file = new StopNoteFile(directory, 101)
  expect(await file.read()).toBeUndefined()
  for (const note of [clean, { format: 1, whyNot: 'killed' } as const]) {
    await file.write(note)
    expect(await new StopNoteFile(directory, 101).read()).toEqual(note)
  }
  await file.forget()
  expect(await file.read()).toBeUndefined()
})

test('a note that makes no sense is none', async () => {
  const { clean: content } = clean
  const broken = [
    'not JSON', '{}', { ...clean, format: 2 }, { format: 1, clean: {} }, { format: 1, clean: { ...content, files: {} } }, { format: 1, clean: { ...content, files: undefined } }, { format: 1, clean: { ...content, disks: [] } },
    { format: 1, clean: { ...content, lastSeq: '90' } }, { format: 1, clean: { ...content, bootId: undefined } }, { format: 1, clean: { ...content, files: { scsi0: { ...content.files.scsi0, ctimeNs: 5 } } } },
  ]
  for (const content of broken) {
    await writeFile(join(directory, 'stopped-101.json'), typeof content === 'string' ? content : JSON.stringify(content))
    expect(await new StopNoteFile(directory, 101).read()).toBeUndefined()
  }
})

test('a file is proved once its time of change has settled; what is gone or no file is not', async () => {
  const path = join(directory, 'disk')
  await writeFile(path, 'one')
  const before = await proveFile(path)
  expect(before).toMatchObject({ path, sizeBytes: '3' })
  await writeFile(path, 'two')
  const after = await proveFile(path)
  expect(after).toMatchObject({ path, sizeBytes: '3' })
  expect(after).not.toEqual(before)
  expect(await proveFile(path)).toEqual(after)
  expect(await proveFile(directory)).toHaveProperty('none')
  expect(await proveFile(`${path}.gone`)).toEqual({ none: 'its file is gone' })
})
