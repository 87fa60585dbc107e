import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { setTimeout as delay } from 'node:timers/promises'
import { processesWith } from './process.ts'

export type TempDir = { path: string; [Symbol.asyncDispose](): Promise<void> }

/** A new directory /tmp/cdp-XXXXXX: short, because a unix socket's path holds 107 bytes. Disposing removes it with all it holds. */
export const makeTempDir = (prefix = 'cdp'): TempDir => {
  const path = mkdtempSync(`/tmp/${prefix}-`)
  return {
    path,
    async [Symbol.asyncDispose]() {
      rmSync(path, { recursive: true, force: true, maxRetries: 3 })
    },
  }
}

/** `leaksOf`, once what is ending has had its time: the kernel closes the files of a killed QEMU after its threads, one by one. */
export const lastingLeaksOf = async (rootDir: string, deadlineMs = 3000): Promise<string[]> => {
  const endMs = performance.now() + deadlineMs
  while (true) {
    const leaks = leaksOf(rootDir)
    if (leaks.length === 0 || performance.now() > endMs) return leaks
    await delay(20)
  }
}

/** What still uses `rootDir`: processes that name it, listening unix sockets and mounts below it, one line each. Empty is as it should be after a test. */
export const leaksOf = (rootDir: string): string[] => [
  ...processesWith(rootDir).map(({ pid, commandLine }) => `process ${pid}: ${commandLine.slice(0, 200)}`),
  ...linesOf('/proc/net/unix')
    .map((line) => line.split(/\s+/)[7] ?? '')
    .filter((path) => path.startsWith(`${rootDir}/`))
    .map((path) => `socket ${path}`),
  ...linesOf('/proc/self/mounts')
    .map((line) => line.split(' ')[1] ?? '')
    .filter((path) => path === rootDir || path.startsWith(`${rootDir}/`))
    .map((path) => `mount ${path}`),
]

const linesOf = (path: string): string[] => readFileSync(path, 'utf8').split('\n')
