// Compiles the tree to dist/ unless dist/ is newer than every source file.
import { spawnSync } from 'node:child_process'
import { globSync, statSync, utimesSync, writeFileSync } from 'node:fs'

const stamp = 'dist/.built'
const modifiedMs = (path) => statSync(path, { throwIfNoEntry: false })?.mtimeMs ?? 0
const sources = globSync('{core,plugin,agent,cli,bench,test}/**/*.ts').concat('tsconfig.json', 'package-lock.json')
const builtMs = modifiedMs(stamp)
if (builtMs === 0 || sources.some((path) => modifiedMs(path) > builtMs)) {
  const begun = new Date()
  const { status } = spawnSync('tsc', ['-p', '.'], { stdio: 'inherit' })
  if (status !== 0) process.exit(status ?? 1)
  // What was changed while it ran is newer than this.
  writeFileSync(stamp, '')
  utimesSync(stamp, begun, begun)
}
