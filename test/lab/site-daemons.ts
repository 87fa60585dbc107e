import { spawn } from 'node:child_process'
import { closeSync, mkdirSync, openSync, readFileSync, writeFileSync } from 'node:fs'
import { setTimeout as delay } from 'node:timers/promises'
import { agentApi, ApiClient, pluginApi } from '../../core/api/index.ts'
import { CdpError } from '../../core/errors/index.ts'
import { endProcess } from './process.ts'
import { projectDir } from './project.ts'
import { agentConfig, pluginConfig } from './site-config.ts'

/** A daemon of one of the two sites, started after the guests and ended before them. */
export type SiteDaemon = {
  name: string
  /** Program and arguments; {root} is the lab's root, {config} the configuration file. */
  command: readonly string[]
  /** Content of ROOT/lab/NAME.config.json; every path of the daemon is in it. */
  config: (rootDir: string) => Record<string, unknown>
  /** Resolves when it answers; the log is ROOT/lab/NAME.log. */
  ready: (rootDir: string, signal: AbortSignal) => Promise<void>
}

export type RunningDaemon = { name: string; pid: number; command: string[]; config: string; log: string }

const siteDaemon = (name: 'agent' | 'plugin'): SiteDaemon => ({
  name,
  command: [process.execPath, `${projectDir()}/dist/${name}/main.js`, '--config', '{config}'],
  config: name === 'agent' ? agentConfig : pluginConfig,
  ready: async (rootDir, signal) => {
    const api = new ApiClient({ socketPath: String((name === 'agent' ? agentConfig : pluginConfig)(rootDir).apiSocket), daemon: `the ${name}`, unit: `pve-cdp-${name}` })
    while (true) {
      try {
        return void (await api.call(name === 'agent' ? agentApi.status : pluginApi.status, {}, { signal }))
      } catch (error) {
        if (signal.aborted) throw error
        await delay(50)
      }
    }
  },
})

/** The daemons of both sites in the order of their start. */
export const siteDaemons: readonly SiteDaemon[] = [siteDaemon('agent'), siteDaemon('plugin')]

/** Starts them one after the other; if one does not answer within 20 s, those already started are ended and its log is in the error. */
export const startSiteDaemons = async (rootDir: string, daemons = siteDaemons): Promise<RunningDaemon[]> => {
  const running: RunningDaemon[] = []
  mkdirSync(`${rootDir}/lab`, { recursive: true })
  for (const { name, command, config, ready } of daemons) {
    const paths = { config: `${rootDir}/lab/${name}.config.json`, log: `${rootDir}/lab/${name}.log` }
    writeFileSync(paths.config, JSON.stringify(config(rootDir), null, 2))
    const filled = command.map((part) => part.replaceAll('{root}', rootDir).replaceAll('{config}', paths.config))
    const log = openSync(paths.log, 'a')
    const child = spawn(filled[0], filled.slice(1), { detached: true, stdio: ['ignore', log, log] })
    closeSync(log)
    const over = new AbortController()
    let answered = false
    const ended = new Promise<never>((_resolve, reject) => {
      child.on('error', (cause) => reject(new CdpError('IO', `${name} cannot run: ${cause.message}`, { cause })))
      child.on('exit', (code, signal) => answered || reject(new CdpError('CLOSED', `${name} ended with ${signal ?? code}: ${readFileSync(paths.log, 'utf8').slice(-2000)}`)))
    })
    ended.catch(() => over.abort())
    try {
      await Promise.race([ready(rootDir, AbortSignal.any([over.signal, AbortSignal.timeout(20_000)])), ended])
      answered = true
      running.push({ name, pid: child.pid!, command: filled, ...paths })
      child.unref()
    } catch (error) {
      if (child.pid !== undefined) await endProcess(child.pid)
      for (const { pid } of running.toReversed()) await endProcess(pid)
      throw error
    }
  }
  return running
}
