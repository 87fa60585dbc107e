import { getPriority } from 'node:os'
import { Worker } from 'node:worker_threads'
import { expect, test } from '@jest/globals'

test('a thread that yields has a lower priority; its process has not', async () => {
  const source = `
    import { parentPort } from 'node:worker_threads'
    import { getPriority } from 'node:os'
    import { readlinkSync } from 'node:fs'
    const { yieldToOthers } = await import(${JSON.stringify(new URL('./yield-to-others.ts', import.meta.url).href)})
    parentPort.postMessage([yieldToOthers(), getPriority(Number(readlinkSync('/proc/thread-self').split('/').at(-1)))])`
  const worker = new Worker(new URL(`data:text/javascript,${encodeURIComponent(source)}`))
  const [yielded, priority] = await new Promise<[boolean, number]>((resolve, reject) => {
    worker.once('message', resolve)
    worker.once('error', reject)
  })
  expect([yielded, priority]).toEqual([true, Math.max(getPriority(process.pid), 5)])
  await worker.terminate()
})
