import { mkdtempSync, rmSync, writeFileSync, readFileSync, statSync, existsSync } from 'node:fs'
import { join } from 'node:path'
import { afterAll, describe, expect, test } from '@jest/globals'
import { Type } from '@sinclair/typebox'
import { readJsonFile, removeFile, writeFileDurably, writeJsonFile } from '../files/index.ts'
import { loadConfig } from './index.ts'

const dir = mkdtempSync('/tmp/cdp-')
afterAll(() => rmSync(dir, { recursive: true, force: true }))
const path = join(dir, 'c.json')
const schema = Type.Object(
  {
    port: Type.Integer({ default: 8765, minimum: 0, maximum: 65_535 }),
    log: Type.Object({ level: Type.Union([Type.Literal('info'), Type.Literal('debug')], { default: 'info' }) }, { default: {}, additionalProperties: false }),
  },
  { additionalProperties: false },
)
const load = (content: string) => {
  writeFileSync(path, content)
  return loadConfig(path, schema)
}

describe('loadConfig', () => {
  test('fills in defaults, also within groups, and never shares them between calls', async () => {
    const first = await loadConfig(undefined, schema)
    expect(first).toEqual({ port: 8765, log: { level: 'info' } })
    first.log.level = 'debug'
    expect(await loadConfig(undefined, schema)).toEqual({ port: 8765, log: { level: 'info' } })
    expect(await load('{"log":{"level":"debug"}}')).toEqual({ port: 8765, log: { level: 'debug' } })
  })

  test.each([
    ['{"port":70000}', '/port'], ['{"port":"1"}', '/port'], ['{"prot":1}', '/prot'], ['{"log":{"level":"loud"}}', '/log/level'], ['{"log":{"colour":1}}', '/log/colour'], ['{"log":5}', '/log'],
  ])('%s is refused, naming %s', async (content, field) => {
    await expect(load(content)).rejects.toMatchObject({ code: 'BAD_INPUT', message: expect.stringContaining(field), hint: expect.any(String) })
  })

  test.each(['[]', 'null', '5', '"x"'])('%s is no configuration', async (content) => {
    await expect(load(content)).rejects.toMatchObject({ code: 'BAD_INPUT' })
  })

  test('a missing or broken file says so, with a hint', async () => {
    await expect(loadConfig(join(dir, 'none'), schema)).rejects.toMatchObject({ code: 'NOT_FOUND', hint: expect.any(String) })
    await expect(load('{')).rejects.toMatchObject({ code: 'FORMAT', hint: expect.any(String) })
  })
})

describe('durable files', () => {
  test('are written whole, private, and removed as often as one likes', async () => {
    const file = join(dir, 'f.json')
    expect(await readJsonFile(file)).toBeUndefined()
    await writeJsonFile(file, { a: 1 })
    await writeJsonFile(file, { a: 2 })
    expect(await readJsonFile(file)).toEqual({ a: 2 })
    expect([statSync(file).mode & 0o777, existsSync(`${file}.new`)]).toEqual([0o600, false])
    await removeFile(file)
    await removeFile(file)
    expect(existsSync(file)).toBe(false)
  })

  test('a write that was cut off leaves the old content, and the next one works', async () => {
    const file = join(dir, 'g')
    await writeFileDurably(file, 'old')
    writeFileSync(`${file}.new`, 'torn')
    expect(readFileSync(file, 'utf8')).toBe('old')
    await writeFileDurably(file, 'new')
    expect(readFileSync(file, 'utf8')).toBe('new')
    await expect(writeFileDurably(join(dir, 'no/such/directory'), 'x')).rejects.toMatchObject({ code: 'ENOENT' })
  })
})
