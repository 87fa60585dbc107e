import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { afterEach, beforeEach, expect, test } from '@jest/globals'
import { RunWatch } from './run-watch.ts'

let directory = ''
beforeEach(async () => {
  directory = await mkdtemp('/tmp/cdp-m-')
})
afterEach(() => rm(directory, { recursive: true, force: true }))

/** Looks, and who waits for the next one. */
class Looks {
  count = 0
  #waiters: (() => void)[] = []
  readonly look = (): void => {
    this.count++
    for (const wake of this.#waiters.splice(0)) wake()
  }

  async until(done: () => boolean): Promise<void> {
    while (!done()) await new Promise<void>((resolve) => this.#waiters.push(resolve))
  }
}

test('it looks at once, soon after a file of its VM comes or goes, and each second in any case; not when another VM changes', async () => {
  const looks = new Looks()
  using watch = new RunWatch(directory, 10, looks.look)
  watch.start()
  expect(looks.count).toBe(1)
  const seenAfterMs: number[] = []
  // Right after a look the poll alone would take a second, each time.
  for (let n = 0; n < 4; n++) {
    const before = looks.count
    const startMs = performance.now()
    await writeFile(join(directory, '10.pid'), String(n))
    await looks.until(() => looks.count > before)
    seenAfterMs.push(performance.now() - startMs)
    await looks.until(() => performance.now() - startMs > 300)
  }
  expect(Math.min(...seenAfterMs)).toBeLessThan(700)
  const before = looks.count
  const startMs = performance.now()
  await writeFile(join(directory, '100.pid'), '1')
  await looks.until(() => performance.now() - startMs > 1_500)
  expect(looks.count - before).toBeLessThan(3)
})

test('a directory that comes later is watched then; told to hurry it looks often, and not for ever', async () => {
  const looks = new Looks()
  using watch = new RunWatch(join(directory, 'later'), 10, looks.look)
  watch.start()
  await mkdir(join(directory, 'later'))
  await looks.until(() => looks.count > 1)
  const before = looks.count
  watch.hurry(300)
  await looks.until(() => looks.count >= before + 4)
  // One that is not calmed looks on while the other one has ended.
  const others = new Looks()
  using other = new RunWatch(join(directory, 'later'), 10, others.look)
  other.start()
  watch.hurry(10_000)
  other.hurry(10_000)
  watch.calm()
  watch[Symbol.dispose]()
  const after = looks.count
  await others.until(() => others.count >= 5)
  expect(looks.count).toBe(after)
})
