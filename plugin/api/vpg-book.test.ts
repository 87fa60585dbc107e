import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, test } from '@jest/globals'
import { VpgBook } from './vpg-book.ts'

let dir = ''
beforeEach(async () => void (dir = await mkdtemp('/tmp/cdp-')))
afterEach(() => rm(dir, { recursive: true, force: true }))
const shop = { name: 'shop', vmIds: [101, 102], checkpointEveryMs: 5000 }

describe('VpgBook', () => {
  test('gives back what was written, and nothing when there is no file', async () => {
    const book = new VpgBook(join(dir, 'vpgs.json'))
    expect(await book.read()).toEqual([])
    await book.write([shop])
    expect(await new VpgBook(join(dir, 'vpgs.json')).read()).toEqual([shop])
  })

  test.each(['[]', '{"format":2,"vpgs":[]}', '{"format":1}', '{"format":1,"vpgs":[{"name":"a"}]}', '{"format":1,"vpgs":[{"name":"a","vmIds":["x"],"checkpointEveryMs":1}]}', '{'])('refuses %s', async (content) => {
    await writeFile(join(dir, 'vpgs.json'), content)
    await expect(new VpgBook(join(dir, 'vpgs.json')).read()).rejects.toMatchObject({ code: 'FORMAT', hint: expect.any(String) })
  })
})
